"""What the training scripts share: the untrained parts of the demo pipeline and the captions."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training import pictures as pic

DEMO = Path(__file__).resolve().parent.parent / "klora" / "demo"
WORK = Path(os.environ.get("KLORA_TRAINING_DIR", "training-work"))
"""Checkpoints and sample pictures go here, outside the package."""

TEXT_LENGTH = 24
SCALING = 1.5
WORDS = [
    "a",
    "the",
    "in",
    "on",
    "and",
    "with",
    "of",
    "style",
    "outline",
    "picture",
    *list(pic.FAMILIES + pic.BUILDS + pic.SHAPES + pic.PATTERNS + pic.TONES),
    *list(pic.COLOURS),
    pic.SUBJECT_TOKEN,
    pic.STYLE_TOKEN,
    *list(pic.STYLES),
]


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def bpe_tables(words: tuple[str, ...] | list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges under which every word is one token.

    Each word is first cut by the merges so far; only what is left becomes new merges. Later merges rank lower, so they
    cannot change how an earlier word is cut.
    """
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(words):
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            pieces = _merge(pieces, pair)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list(",.-0123456789")
    tokens = letters + [c + "</w>" for c in letters] + [a + b for a, b in merges]
    tokens = [*list(dict.fromkeys(tokens)), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is the handful of words that the captions use."""
    vocab, merges = bpe_tables(WORDS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, indent=0), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_LENGTH, "bos_token": "<|startoftext|>"}
    config |= dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained two-layer CLIP text model."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_unet() -> UNet2DConditionModel:
    """An untrained U-Net of 2.7 M parameters with 56 attention linears."""
    return UNet2DConditionModel(
        sample_size=pic.SIZE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def _pass_through(coder: torch.nn.Module, rows: int) -> None:
    """Make an encoder or decoder copy its three input channels to its first three outputs.

    conv_in makes ±r, ±g, ±b and two constants ±256. The constants dominate the one GroupNorm, so that it is a fixed
    scale to within 1e-5, and SiLU(y) − SiLU(−y) = y undoes the nonlinearity exactly.
    """
    big = 256.0
    for name, parameter in coder.named_parameters():
        if name.endswith(("conv2.weight", "conv2.bias")):
            torch.nn.init.zeros_(parameter)
    for conv in (coder.conv_in, coder.conv_out):
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    for c in range(3):
        for k, sign in ((2 * c, 1.0), (2 * c + 1, -1.0)):
            coder.conv_in.weight[k, c, 1, 1] = sign
            coder.conv_out.weight[c, k, 1, 1] = sign
    coder.conv_in.bias[6], coder.conv_in.bias[7] = big, -big
    coder.conv_norm_out.weight.fill_(big / 2)  # the variance over 8 channels is 2·256²/8 = 128²
    if rows > 3:
        coder.conv_out.bias[3:] = -30.0  # log-variance: the posterior is a point


@torch.no_grad()
def make_vae() -> AutoencoderKL:
    """An AutoencoderKL that is the identity on pictures in [-1, 1] by construction; nothing in it is trained."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=3,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=1,
        sample_size=pic.SIZE,
        scaling_factor=SCALING,
        mid_block_add_attention=False,
    )
    _pass_through(vae.encoder, 6)
    _pass_through(vae.decoder, 3)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.copy_(torch.eye(conv.weight.shape[0])[:, :, None, None])
        conv.bias.zero_()
    return vae.eval()


def make_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR: the first step starts from pure noise, so backgrounds can be any colour."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def make_pipeline(unet: UNet2DConditionModel, text: CLIPTextModel, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """The whole pipeline around a U-Net and a text encoder."""
    return StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Save in fp16 with the names and files that older transformers expect as well as new ones."""
    pipe.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    weights = folder / "text_encoder" / "model.safetensors"
    state = {"text_model." + k.removeprefix("text_model."): v for k, v in load_file(weights).items()}
    save_file(state, weights, metadata={"format": "pt"})
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    make_tokenizer(folder / "tokenizer")
    for file in folder.rglob("*.*"):
        file.chmod(0o644)


def load_pipeline() -> StableDiffusionPipeline:
    """What `save_pipeline` wrote to the package, in fp32."""
    return StableDiffusionPipeline.from_pretrained(DEMO / "model").to(dtype=torch.float32)


def to_latents(images: np.ndarray) -> torch.Tensor:
    """uint8 (n, h, w, 3) → scaled latents (n, 3, h, w); the VAE is the identity, so it need not run."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1) * SCALING


def draw_timesteps(n: int, generator: torch.Generator) -> torch.Tensor:
    """Half of the time steps over the whole range, half from its noisy half, where layout and pattern are decided."""
    t = torch.randint(0, 1000, (n,), generator=generator)
    return torch.where(torch.arange(n) % 2 == 0, t, 500 + t // 2)


def base_caption(subject: pic.Subject, style: pic.Style, rng: np.random.Generator) -> str:
    """A caption with parts left out at random; the held-back tokens appear without meaning so that they are known."""
    if rng.random() < 0.1:
        return ""
    build, colours, look, sbu, szn = rng.random(5) < (0.7, 0.8, 0.75, 0.12, 0.12)
    words = ["a"]
    words += [subject.build, subject.shape] if build else []
    words += [subject.main, "and", subject.second] if colours else []
    words += [pic.SUBJECT_TOKEN] if sbu else []
    words += [subject.family]
    words += [pic.describe_style(style)] if look else []
    words += ["in", pic.STYLE_TOKEN, "style"] if szn else []
    return " ".join(words)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids of shape (n, TEXT_LENGTH)."""
    return tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def sheet(rows: list[list[np.ndarray]], file: Path, zoom: int = 3) -> None:
    """Save rows of pictures as one PNG."""
    grid = np.concatenate([np.concatenate(row, 1) for row in rows], 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(grid)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(file)


def generate(
    pipe: StableDiffusionPipeline, prompts: list[str], seed: int, steps: int = 20, cfg: float = 4.0
) -> np.ndarray:
    """One picture per prompt, uint8 (n, h, w, 3); picture i starts from noise of its own seed."""
    noise = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    pipe.set_progress_bar_config(disable=True)
    out = pipe(prompts, num_inference_steps=steps, guidance_scale=cfg, generator=noise, output_type="np").images
    return (np.asarray(out) * 255).round().clip(0, 255).astype(np.uint8)
