"""A pipeline of SDXL's real widths with random weights, small enough for any machine, and LoRAs for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from klora.cache import ScoreCache
from klora.hosts.diffusers import DiffusersHost
from klora.lora.file import LoraFile
from klora.lora.names import kind_of
from klora.pair import Pair

CONTEXT = 2048
TOKENS = 77


def make_pipeline(layers: int = 1, channels: tuple[int, int] = (640, 1280)) -> Any:
    """A pipeline without VAE and text encoders, to be called with embeddings and to give latents.

    SDXL's 640 and 1280 channels or others, with one and `layers` transformer layers at each of their places.
    """
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        transformer_layers_per_block=(1, layers),
        attention_head_dim=(channels[0] // 64, channels[1] // 64),
        cross_attention_dim=CONTEXT,
        use_linear_projection=True,
    ).eval()
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def picture(pipe: Any, steps: int, pixels: int, seed: int = 0) -> Tensor:
    """The latents of one picture with guidance."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(2, 1, TOKENS, CONTEXT, generator=generator).to(pipe.unet.device, pipe.unet.dtype)
    latents: Tensor = pipe(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        num_inference_steps=steps,
        height=pixels,
        width=pixels,
        generator=generator,
        output_type="latent",
    ).images
    return latents


def module_shapes(pipe: Any, kinds: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of the model's modules of these kinds (attention, linear, conv), by canonical name."""
    return {name: site.shape for name, site in DiffusersHost(pipe).sites().items() if kind_of(name) in kinds}


def write_lora(path: Path, shapes: Mapping[str, tuple[int, ...]], rank: int, seed: int, family: str = "lora") -> Path:
    """Write a kohya or LyCORIS file of random fp16 weights: lora, dora, loha, lokr or full."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).half()

    tensors: dict[str, Tensor] = {}
    for name, (out, inner, *kernel) in shapes.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        found = _tensors(family, out, inner, tuple(kernel), rank, draw)
        tensors |= {f"{key}.{slot}": tensor.contiguous() for slot, tensor in found.items()}
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path)
    return path


def write_pair(folder: Path, shapes: Mapping[str, tuple[int, ...]], rank: int, family: str = "lora") -> list[Path]:
    """Two such files in a folder, which is made where it is missing."""
    folder.mkdir(exist_ok=True)
    return [write_lora(folder / f"{seed}.safetensors", shapes, rank, seed, family) for seed in (1, 2)]


def open_pair(files: list[Path]) -> Pair:
    """The pair, whose scores are kept beside it."""
    return Pair.open(files[0], files[1], ScoreCache(files[0].parent / "cache"))


def _tensors(family: str, out: int, inner: int, kernel: tuple[int, ...], rank: int, draw: Any) -> dict[str, Tensor]:
    if family == "full":
        return {"diff": draw(out, inner, *kernel)}
    flat = inner * (kernel[0] * kernel[1] if kernel else 1)
    if family == "loha":
        return {
            "hada_w1_a": draw(out, rank),
            "hada_w1_b": draw(rank, flat),
            "hada_w2_a": draw(out, rank),
            "hada_w2_b": draw(rank, flat),
        }
    if family == "lokr":
        return {"lokr_w1": draw(8, 8), "lokr_w2_a": draw(out // 8, rank), "lokr_w2_b": draw(rank, flat // 8)}
    tensors = {"lora_down.weight": draw(rank, inner, *kernel), "lora_up.weight": draw(out, rank, *(1 for _ in kernel))}
    if family == "dora":
        tensors["dora_scale"] = draw(out, 1, *(1 for _ in kernel)).abs() + 1
    return tensors


@contextmanager
def merged(layers: Mapping[str, nn.Linear | nn.Conv2d], *files: LoraFile) -> Iterator[None]:
    """Ordinary LoRAs in the weights of layers by canonical name, and out of them again."""
    before = {name: layer.weight.data.clone() for name, layer in layers.items()}
    for file in files:
        for name, delta in file.modules.items():
            weight = layers[name].weight.data
            weight += delta.matrix(weight).view(weight.shape).to(weight)
    yield
    for name, layer in layers.items():
        layer.weight.data.copy_(before[name])


def linears_of(pipe: Any, names: Mapping[str, tuple[int, ...]]) -> dict[str, nn.Linear | nn.Conv2d]:
    """The modules by canonical name."""
    return {name: site.module for name, site in DiffusersHost(pipe).sites().items() if name in names}
