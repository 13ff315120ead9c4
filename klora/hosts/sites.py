"""A diffusion model's modules as WebUIs and ComfyUI load it, and the names by which LoRA files may mean them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from klora.engine.compiled import written_path
from klora.engine.site import Site, module_shape
from klora.lora.model_index import Rows, finest_slices, slice_name
from klora.lora.names import is_flux, resolve

ROOT = "diffusion_model."
WEIGHT = ".weight"
_THIRD = re.compile(r"(.+)_([qkv])_proj$")
# The one weight of FLUX that the rule does not name.
_WITHOUT_NAME = "final_layer.adaLN_modulation.1"


@dataclass(frozen=True)
class NamedSites:
    """The sites of a model by canonical name; other spellings, and which of those names each stands for."""

    sites: dict[str, Site] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)


def is_flux_model(diffusion_model: nn.Module) -> bool:
    """Whether all of a model's modules have names of FLUX."""
    targets = [resolve(path) for path, _, _ in _modules(diffusion_model) if path != _WITHOUT_NAME]
    return bool(targets) and all(found and is_flux(found[0].name) for found in targets)


def weights_by_rule(diffusion_model: nn.Module) -> NamedSites:
    """The weights of SD, SDXL and FLUX under their names in diffusers, fused ones slice by slice."""
    weights = NamedSites()
    for path, module, shape in _modules(diffusion_model):
        for target in resolve(path) or ():
            rows = target.rows(*shape[:2]) if target.fused else None
            weights.sites[target.name] = Site(module, rows, known_shape=shape)
    return weights


def weights_by_table(diffusion_model: nn.Module, names: Mapping[str, str]) -> NamedSites:
    """The weights of a model whose host has a table of its paths, under the canonical `names` that it gives of them."""
    weights = NamedSites()
    for path, module, shape in _modules(diffusion_model):
        name = names.get(path, path)
        weights.sites[name] = Site(module, known_shape=shape)
        weights.aliases[path] = [name]
    return weights


def weights_by_host(diffusion_model: nn.Module, keys: Mapping[str, Any]) -> NamedSites:
    """The weights of any model under their own paths, and the host's `keys` for them.

    A value of `keys` is a weight's name, or (name, (0, start, length)) for rows of a fused one. A weight is cut along
    the finest slices that the keys have of it, where these cover it exactly; else it is one, and each slice beside it
    another. What is unknown, out of range or needs a function of the host's is left out.
    """
    named: dict[str, dict[str, Rows | None]] = {}
    for key, value in keys.items():
        if place := _place(value):
            named.setdefault(place[0], {})[key] = place[1]
    weights = NamedSites()
    for path, module, shape in _modules(diffusion_model):
        mine = _within(named.get(path, {}), shape[0])
        parts = sorted({rows for rows in mine.values() if rows})
        slices = finest_slices(shape[0], parts)
        if not slices:
            weights.sites[path] = Site(module, known_shape=shape)
        for rows in slices or parts:
            weights.sites[slice_name(path, rows)] = Site(module, rows, known_shape=shape)
        for key, span in {path: None, **mine}.items():
            inside = [one for one in slices if span is None or (span[0] <= one[0] and one[1] <= span[1])]
            weights.aliases[key] = [slice_name(path, one) for one in inside] or [slice_name(path, span)]
    return weights


def third_of(name: str, heights: Mapping[str, int]) -> tuple[str, tuple[int, int, int]] | None:
    """The rows that A1111 means by `….qkv_q_proj`: a third of a fused weight; None for any other name."""
    match = _THIRD.fullmatch(name)
    if match is None or match[1] not in heights:
        return None
    length = heights[match[1]] // 3
    return match[1], (0, "qkv".index(match[2]) * length, length)


def _place(value: Any) -> tuple[str, Rows | None] | None:
    """(path, rows) of a value of a host's map; None for what cannot be used."""
    name, slice_, *function = (value, None) if isinstance(value, str) else (*value, None)[:3]
    if any(function) or not (name.startswith(ROOT) and name.endswith(WEIGHT)):
        return None
    path = name[len(ROOT) : -len(WEIGHT)]
    if slice_ is None:
        return path, None
    dimension, start, length = slice_
    return (path, (start, start + length)) if dimension == 0 else None


def _within(named: Mapping[str, Rows | None], height: int) -> dict[str, Rows | None]:
    """What a map's keys name of a weight of `height` rows, without what it does not have.

    A map may give q, k and v as many rows each, where k and v have fewer heads than q and share the rest.
    """
    fused = sorted({rows for rows in named.values() if rows})
    length = fused[0][1] if fused else 0
    if fused == [(i * length, (i + 1) * length) for i in range(3)] and length < height < 3 * length:
        rest = (height - length) // 2
        real = dict(zip(fused, [(0, length), (length, length + rest), (length + rest, height)], strict=True))
        named = {key: rows and real[rows] for key, rows in named.items()}
    return {key: rows for key, rows in named.items() if rows is None or 0 <= rows[0] < rows[1] <= height}


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    for path, module in model.named_modules():
        # What torch.compile has made of a module has the attributes of that, which comes next.
        shape = None if hasattr(module, "_orig_mod") else weight_shape(module)
        if shape is not None:
            yield written_path(path), module, shape


def weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """The shape of a linear or convolution weight, however it is stored; None for any other module."""
    if hasattr(module, "in_features") or hasattr(module, "kernel_size"):
        return module_shape(module)
    weight = getattr(module, "weight", None)
    if "Linear" not in type(module).__name__ or weight is None:
        return None
    # GGUF keeps the real shape beside the packed one, bitsandbytes in the state of the quantisation.
    shape = getattr(weight, "real_shape", None) or getattr(getattr(weight, "quant_state", None), "shape", weight.shape)
    # As plain numbers: hosts give those of GGUF as numpy's, of which a product with an int may be a float.
    return tuple(map(int, shape)) if len(shape) == 2 else None
