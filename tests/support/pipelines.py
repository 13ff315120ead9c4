"""Tiny random pipelines of the real diffusers classes, with the real module names."""

from __future__ import annotations

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

CONTEXT = 32
TOKENS = 16


def clip_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that knows the letters of the alphabet."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def clip_text_model(with_projection: bool = False, width: int = CONTEXT) -> Any:
    """A CLIP text encoder of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=TOKENS,
        projection_dim=CONTEXT,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config).eval()


def t5() -> Any:
    """A T5 encoder of two layers."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=54, d_model=CONTEXT, d_ff=48, d_kv=8, num_heads=4, num_layers=2)).eval()


def autoencoder(channels: int = 4) -> Any:
    """A VAE that halves each side."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        shift_factor=0.1,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
    ).eval()


def scheduler(name: str = "DDIMScheduler", **options: Any) -> Any:
    """Any diffusers scheduler, with the noise schedule of Stable Diffusion."""
    import diffusers

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    usual = {"steps_offset": 1, "clip_sample": False}
    return kind(**betas, **{key: value for key, value in usual.items() if key in known}, **options)


def sd_pipeline(folder: Path, kind: str = "StableDiffusionPipeline", levels: int = 4) -> Any:
    """SD 1.5 in small: its block types and module names, a layer in each block, 80 attention linears.

    With fewer than its 4 `levels` it is sooner made, run and compiled; with one, its middle alone has attention.
    """
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        cross_attention_dim=CONTEXT,
        attention_head_dim=2,
        block_out_channels=(8, 16, 16, 16)[:levels],
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
    ).eval()
    pipe = getattr(diffusers, kind)(
        unet=unet,
        vae=autoencoder(),
        text_encoder=clip_text_model(),
        tokenizer=clip_tokenizer(folder),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl_pipeline(folder: Path, kind: str = "StableDiffusionXLPipeline") -> Any:
    """SDXL in small: its block types and module names, a layer in each block, 88 attention linears."""
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        cross_attention_dim=2 * CONTEXT,
        attention_head_dim=(1, 2, 4),
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=CONTEXT + 6 * 8,
    ).eval()
    pipe = getattr(diffusers, kind)(
        unet=unet,
        vae=autoencoder(),
        text_encoder=clip_text_model(),
        text_encoder_2=clip_text_model(with_projection=True),
        tokenizer=clip_tokenizer(folder),
        tokenizer_2=clip_tokenizer(folder),
        scheduler=scheduler("EulerDiscreteScheduler"),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_pipeline(folder: Path, kind: str = "FluxPipeline") -> Any:
    """FLUX in small: two double and three single blocks."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=CONTEXT,
        pooled_projection_dim=CONTEXT,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
    pipe = getattr(diffusers, kind)(
        transformer=transformer,
        vae=autoencoder(),
        text_encoder=clip_text_model(),
        text_encoder_2=t5(),
        tokenizer=clip_tokenizer(folder),
        tokenizer_2=clip_tokenizer(folder),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES = {"sd": sd_pipeline, "sdxl": sdxl_pipeline, "flux": flux_pipeline}
SMALLER = {**PIPELINES, "sd": partial(sd_pipeline, levels=2)}
"""The same, where the depth of SD's UNet tells nothing."""


def run(pipe: Any, **options: Any) -> torch.Tensor:
    """The latents of one small picture, from fixed noise."""
    if "image" not in options:
        options = {"height": 32, "width": 32, **options}
    if "Flux" in type(pipe).__name__:
        options["max_sequence_length"] = TOKENS
    generator = torch.Generator().manual_seed(0)
    call = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "latent", "generator": generator, **options}
    return pipe(**call).images
