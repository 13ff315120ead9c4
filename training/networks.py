"""The untrained parts of the demo pipeline, and how the whole of it is saved and loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.drawing.pictures import SIZE
from training.words import TEXT_LENGTH, make_tokenizer

WORK = Path(os.environ.get("KLORA_TRAINING_DIR", "training-work"))
"""Checkpoints and sample pictures go here, outside the package."""
RELEASE = WORK / "release"
"""What would ship: model, LoRAs, judge and catalogue; `python -m training.ship` copies it to the package."""

LATENT_CHANNELS = 8
TEXT_WIDTH = 64


def make_vae() -> AutoencoderKL:
    """An untrained autoencoder: 64×64 pixels to 16×16 latents of eight channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 32, 48),
        layers_per_block=1,
        norm_num_groups=1,  # more groups take the absolute colours away
        sample_size=SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def make_unet() -> UNet2DConditionModel:
    """An untrained U-Net of 3.7 M parameters on 16×16 latents: 112 attention linears, at both levels."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 96),
        layers_per_block=1,
        transformer_layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained two-layer CLIP text model."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_scheduler() -> DDIMScheduler:
    """The noise of training: v-prediction with zero terminal SNR, so that a ground can be any colour."""
    return DDIMScheduler(
        beta_schedule="linear",
        beta_start=0.0001,
        beta_end=0.03,
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def make_sampler() -> EulerDiscreteScheduler:
    """The sampler that ships: Euler on Karras' noise levels, from 14.6, as Stable Diffusion's, down to 0.03.

    They place what is decided in which half of the steps: noise is about as strong as a latent when half of them are
    over. Forms are decided by then, surfaces are not (training/README.md).
    """
    noise = make_scheduler().config
    return EulerDiscreteScheduler(
        beta_schedule=noise.beta_schedule,
        beta_start=noise.beta_start,
        beta_end=noise.beta_end,
        prediction_type=noise.prediction_type,
        rescale_betas_zero_snr=noise.rescale_betas_zero_snr,
        timestep_spacing=noise.timestep_spacing,
        steps_offset=noise.steps_offset,
        use_karras_sigmas=True,
        sigma_min=0.03,
        sigma_max=14.6,
    )


def draw_times(n: int, rng: torch.Generator) -> torch.Tensor:
    """Time steps (n,) of training: three in ten uniform, the others from Beta(2, 3), where details are decided."""
    # The second smallest of four uniform numbers has this distribution.
    middle = torch.rand((n, 4), generator=rng).sort(1).values[:, 1]
    uniform, choice = torch.rand((2, n), generator=rng)
    return (1000 * torch.where(choice < 0.3, uniform, middle)).long()


def make_pipeline(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The whole pipeline around its trained parts."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_sampler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Save in fp16, with a tokenizer of three plain files."""
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    weights = folder / "text_encoder" / "model.safetensors"
    state = {k: v for k, v in load_file(weights).items() if not k.endswith("position_ids")}
    save_file(state, weights, metadata={"format": "pt"})
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    make_tokenizer(folder / "tokenizer")
    forget_origin(folder)
    for file in folder.rglob("*.*"):
        file.chmod(0o644)


def forget_origin(folder: Path) -> None:
    """Take the path that a model was loaded from out of its configuration."""
    for file in folder.rglob("config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_pipeline(folder: Path | None = None) -> StableDiffusionPipeline:
    """What `save_pipeline` wrote, in fp32."""
    pipe = StableDiffusionPipeline.from_pretrained(folder or RELEASE / "model").to(dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def as_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (n, h, w, 3) → (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def as_pictures(tensor: torch.Tensor) -> np.ndarray:
    """(n, 3, h, w) in [-1, 1] → uint8 (n, h, w, 3)."""
    return ((tensor.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def generate(
    pipe: StableDiffusionPipeline, prompts: list[str], seed: int, steps: int = 20, guidance: float = 2.5
) -> np.ndarray:
    """One picture per prompt, uint8 (n, h, w, 3); picture i starts from noise of its own seed."""
    noise = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    out = pipe(prompts, num_inference_steps=steps, guidance_scale=guidance, generator=noise, output_type="np").images
    return as_bytes(out)


def as_bytes(images: list[np.ndarray]) -> np.ndarray:
    """What a pipeline gives as "np", in [0, 1] → uint8 (n, h, w, 3)."""
    return (np.asarray(images) * 255).round().clip(0, 255).astype(np.uint8)


def sheet(rows: list[list[np.ndarray]], file: Path, zoom: int = 2) -> None:
    """Save rows of pictures as one PNG."""
    grid = np.concatenate([np.concatenate(row, 1) for row in rows], 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(grid)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(file)
