"""The modules of a diffusion model with LDM names, as WebUIs load it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from klora.engine.bypass import Site, module_shape
from klora.lora.names import resolve


def ldm_sites(diffusion_model: nn.Module) -> Iterator[tuple[str, Site]]:
    """The sites of a model with LDM module names, fused weights slice by slice."""
    for path, module in diffusion_model.named_modules():
        shape = weight_shape(module)
        if shape is None:
            continue
        for target in resolve(f"diffusion_model.{path}") or ():
            rows = target.rows(*shape[:2]) if target.fused else None
            yield target.name, Site(module, rows, known_shape=shape)


def weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """The shape of a linear or convolution weight, however it is stored; None for any other module."""
    if hasattr(module, "in_features") or hasattr(module, "kernel_size"):
        return module_shape(module)
    weight = getattr(module, "weight", None)
    if "Linear" not in type(module).__name__ or weight is None:
        return None
    # GGUF keeps the real shape beside the packed one, bitsandbytes in the state of the quantisation.
    shape = getattr(weight, "real_shape", None) or getattr(getattr(weight, "quant_state", None), "shape", weight.shape)
    return tuple(shape) if len(shape) == 2 else None
