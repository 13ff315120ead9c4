"""Tiny random pipelines of other diffusers classes than SD and FLUX, without text encoders: prompts are embeddings.

Each builder gives a pipeline and the arguments of a call; `make_latents` makes its picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CONTEXT = 32
WORDS = 6
CALL = {"num_inference_steps": 4, "output_type": "latent", "height": 32, "width": 32}
Made = tuple[Any, dict[str, Any]]


def embeddings(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flow(**options: Any) -> Any:
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def vae(channels: int, kind: str = "AutoencoderKL") -> Any:
    """A VAE that halves each side, of the size that matters for its config alone."""
    import diffusers

    return getattr(diffusers, kind)(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=2,
    )


def guided(shape: tuple[int, ...] = (1, WORDS, CONTEXT), mask: bool = False) -> dict[str, Tensor]:
    """Embeddings of a prompt and of its negative."""
    found = {"prompt_embeds": embeddings(*shape), "negative_prompt_embeds": embeddings(*shape, seed=1)}
    if mask:
        found |= {f"{side}prompt_attention_mask": torch.ones(shape[:2], dtype=torch.bool) for side in ("", "negative_")}
    return found


def sd3() -> Made:
    import diffusers

    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=CONTEXT,
        caption_projection_dim=32,
        pooled_projection_dim=CONTEXT,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
    )
    pipe = diffusers.StableDiffusion3Pipeline(transformer, flow(shift=3.0), vae(4), *[None] * 6)
    pooled = {f"{side}pooled_prompt_embeds": embeddings(1, CONTEXT, seed=3 + len(side)) for side in ("", "negative_")}
    return pipe, {**guided(), **pooled}


def chroma() -> Made:
    import diffusers

    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=CONTEXT,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return diffusers.ChromaPipeline(flow(), vae(4), None, None, transformer), guided(mask=True)


def qwen_image() -> Made:
    import diffusers

    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=CONTEXT,
        axes_dims_rope=(2, 2, 4),
    )
    coder = diffusers.AutoencoderKLQwenImage(base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1)
    masks = {f"{side}prompt_embeds_mask": torch.ones(1, WORDS, dtype=torch.long) for side in ("", "negative_")}
    scheduler = flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9)
    return diffusers.QwenImagePipeline(scheduler, coder, None, None, transformer), {**guided(), **masks}


def lumina2() -> Made:
    import diffusers

    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(2, 2, 4),
        axes_lens=(64, 64, 64),
        cap_feat_dim=CONTEXT,
    )
    return diffusers.Lumina2Pipeline(transformer, flow(shift=3.0), vae(4), None, None), guided(mask=True)


def z_image() -> Made:
    import diffusers

    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=CONTEXT,
        axes_dims=[2, 2, 4],
        axes_lens=[256, 64, 64],
    )
    # Made empty, for checkpoints.
    for name, parameter in transformer.named_parameters():
        if name.endswith("pad_token"):
            nn.init.normal_(parameter)
    pipe = diffusers.ZImagePipeline(flow(shift=3.0), vae(4), None, None, transformer)
    prompts = {name: [embeds[0]] for name, embeds in guided().items()}
    return pipe, {**prompts, "guidance_scale": 3.0}


def sana() -> Made:
    import diffusers

    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=CONTEXT,
        sample_size=16,
    )
    coder = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )
    pipe = diffusers.SanaPipeline(None, None, coder, transformer, flow(shift=3.0))
    return pipe, {**guided(mask=True), "negative_prompt": None, "use_resolution_binning": False}


def aura_flow() -> Made:
    import diffusers

    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=CONTEXT,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    return diffusers.AuraFlowPipeline(None, None, vae(4), transformer, flow(shift=1.73)), guided(mask=True)


def pixart_sigma() -> Made:
    import diffusers

    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=32,
        sample_size=16,
        caption_channels=CONTEXT,
        use_additional_conditions=False,
    )
    pipe = diffusers.PixArtSigmaPipeline(None, None, vae(4), transformer, diffusers.DPMSolverMultistepScheduler())
    return pipe, {**guided(mask=True), "negative_prompt": None, "use_resolution_binning": False}


def flux2() -> Made:
    import diffusers

    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=CONTEXT,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
    )
    pipe = diffusers.Flux2Pipeline(flow(), vae(4, "AutoencoderKLFlux2"), None, None, transformer)
    return pipe, {"prompt_embeds": embeddings(1, WORDS, CONTEXT)}


def wan() -> Made:
    import diffusers

    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=CONTEXT,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=32,
    )
    coder = diffusers.AutoencoderKLWan(4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    pipe = diffusers.WanPipeline(None, None, coder, scheduler, transformer)
    return pipe, {**guided(), "num_frames": 1}


OTHERS: dict[str, Callable[[], Made]] = {
    made.__name__: made
    for made in (sd3, chroma, qwen_image, lumina2, z_image, sana, aura_flow, pixart_sigma, flux2, wan)
}


def make(name: str) -> Made:
    """One of them, with weights large enough that all of them matter."""
    torch.manual_seed(0)
    pipe, options = OTHERS[name]()
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.eval()
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return pipe, options


def make_latents(pipe: Any, options: dict[str, Any], **more: Any) -> Tensor:
    """The latents of one small picture, from fixed noise."""
    generator = torch.Generator().manual_seed(0)
    result = pipe(**{**CALL, "generator": generator, **options, **more})
    latents: Tensor = result.frames if hasattr(result, "frames") else result.images
    return latents
