"""Models that torch.compile has made something else of."""

from __future__ import annotations

from typing import Any

from klora.errors import KloraError

COMPILE_KEY = "torch.compile"
"""What ComfyUI's own compilation is known by among the wrappers of a model's calls."""


def check_not_compiled(patcher: Any) -> None:
    """KloraError where a ModelPatcher's model, or a part of it, is compiled: what is compiled heeds no hooks."""
    compiled = any(COMPILE_KEY in found for found in patcher.wrappers.values()) or any(
        # A compiled module stands before the module itself; `module.compile()` leaves it in its place.
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for part in (patcher.model, *patcher.object_patches.values())
        if hasattr(part, "modules")
        for module in part.modules()
    )
    if compiled:
        raise KloraError(
            "this model is compiled (TorchCompileModel, or a node like it), and a compiled model does not heed which"
            " LoRA acts when; take that node out, or put K-LoRA's fusion into a file with a static policy and *Save"
            " fused LoRA*, and load that"
        )
