"""Models that torch.compile has made something else of."""

from __future__ import annotations

from typing import Any

from torch import nn

from klora.engine.compiled import compiled_regions
from klora.errors import KloraError

COMPILE_KEY = "torch.compile"
"""What ComfyUI's own compilation is known by among the wrappers of a model's calls."""


def check_not_compiled(patcher: Any) -> None:
    """KloraError where a ModelPatcher's model, or a part of it, is or will be compiled."""
    parts = (part for part in (patcher.model, *patcher.object_patches.values()) if isinstance(part, nn.Module))
    later = any(COMPILE_KEY in found for found in getattr(patcher, "wrappers", {}).values())
    if later or any(region for part in parts for region in compiled_regions(part)):
        raise KloraError(
            "this model is compiled (TorchCompileModel, or a node like it), and a compiled model does not heed which"
            " LoRA acts when; take that node out, or choose a static policy, write the fusion into a file with the node"
            " Save fused LoRA, and load that"
        )
