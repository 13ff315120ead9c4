"""Weights of ComfyUI's layers as plain tensors, however they are stored."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

from klora.engine.site import Site


def with_plain_weight(site: Site) -> Site:
    """Say how to get at a weight in GGUF, in fp8 beside a scale, or quantised otherwise; leave other sites alone."""
    read = _reader(site.module)
    return dataclasses.replace(site, weight=partial(read, site.module)) if read else site


def _reader(module: Any) -> Any:
    if hasattr(module, "is_ggml_quantized"):
        return _gguf
    if getattr(module, "scale_weight", None) is not None:
        return _scaled
    # Tensors of torch have a method `dequantize` too.
    return _quantised if "QuantizedTensor" in type(module.weight).__name__ else None


def _gguf(module: Any) -> Tensor:
    weight: Tensor = module.get_weight(module.weight, torch.float32)
    return weight


def _scaled(module: Any) -> Tensor:
    scaled: Tensor = module.weight.float() * module.scale_weight.float()
    return scaled


def _quantised(module: Any) -> Tensor:
    weight: Tensor = module.weight.dequantize()
    return weight
