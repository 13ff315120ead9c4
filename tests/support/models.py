"""Module names and shapes of real diffusers configs, built on the meta device (no memory, no download)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn

_SD15: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
UNET_CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": _SD15,
    "sd21": {
        **_SD15,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def module_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Weight shape of every Linear and Conv2d of `model`, by module name."""
    kinds = (nn.Linear, nn.Conv2d)
    return {name: tuple(module.weight.shape) for name, module in model.named_modules() if isinstance(module, kinds)}


@lru_cache(maxsize=8)
def real_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Linear and Conv2d weight shapes of the real "sd15", "sd21", "sdxl" or "flux". Do not change the result."""
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel

    with torch.device("meta"):
        if model == "flux":
            return module_shapes(FluxTransformer2DModel(guidance_embeds=True))
        return module_shapes(UNet2DConditionModel(**UNET_CONFIGS[model]))
