"""Weights of Forge's layers as plain tensors, however they are stored."""

from __future__ import annotations

import dataclasses
import importlib
from functools import partial
from typing import Any

from torch import Tensor

from klora.engine.site import Site


def with_plain_weight(site: Site) -> Site:
    """Say how to get at a weight that is stored as GGUF, or in fp8 beside a scale; leave any other site as it is."""
    if _is_gguf(site.module) or getattr(site.module, "scale_weight", None) is not None:
        return dataclasses.replace(site, weight=partial(_plain_weight, site.module))
    return site


def _is_gguf(module: Any) -> bool:
    return getattr(module.weight, "gguf_cls", None) is not None


def _plain_weight(module: Any) -> Tensor:
    if _is_gguf(module):
        weight: Tensor = importlib.import_module("backend.operations_gguf").dequantize_tensor(module.weight)
        return weight
    scaled: Tensor = module.weight.float() * module.scale_weight.float()
    return scaled
