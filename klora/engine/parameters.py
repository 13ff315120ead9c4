"""Parameters that a LoRA changes beside the weights of its modules: norms, modulations, tables; biases in `held`.

They have no products to be added, so that W′ stands in the place of W0 (`Held`), whatever the way of the weights. They
are small: there is always room for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from klora.engine.held import Form, Held
from klora.lora.parameters import ParameterDelta

Models = Mapping[str, nn.Module]
"""The denoiser under an empty name, and text encoders under the names that paths in them begin with."""
Sum = Sequence[tuple[ParameterDelta, float]]
"""What acts on a parameter: differences of LoRAs, each with what it is multiplied by."""

_MOVING = {"group_offloading", "layerwise_casting"}
"""diffusers' hooks that exchange the data of parameters at each forward."""


def held_parameters(models: Models, sums: Mapping[str, Sum]) -> dict[str, Held]:
    """Parameters by their path, each with what acts on it in it."""
    held = {}
    for path, terms in sums.items():
        *_, owner, _ = _on_the_way(models, path)
        held[path] = Held(owner, path.rpartition(".")[2], _form(terms))
    return held


def unheld(models: Models, paths: Iterable[str]) -> frozenset[str]:
    """Which of these parameters cannot point at something else: stored packed, or moved at each forward."""
    return frozenset(path for path in paths if _is_out_of_reach(models, path))


def _is_out_of_reach(models: Models, path: str) -> bool:
    *owners, parameter = _on_the_way(models, path)
    hooks = {kind for owner in owners for kind in getattr(getattr(owner, "_diffusers_hook", None), "hooks", ())}
    plain = isinstance(parameter, nn.Parameter) and type(parameter.data) is Tensor
    return not plain or not parameter.is_floating_point() or parameter.is_meta or bool(hooks & _MOVING)


def _on_the_way(models: Models, path: str) -> list[Any]:
    """The modules that a parameter is in, from its model on, and last itself; None for what is no longer there."""
    component, *rest = path.split(".")
    found, names = (models[component], rest) if component in models else (models[""], path.split("."))
    if names[0] == "text_model" and not hasattr(found, "text_model"):
        names = names[1:]
    way: list[Any] = [found]
    for name in names:
        way.append(getattr(way[-1], name, None))
    return way


def _form(terms: Sum) -> Form:
    def form(base: Tensor) -> Tensor:
        total = base.float() + torch.stack([delta.change(base) * weight for delta, weight in terms]).sum(0)
        # In fp8, which layers cast at each forward, a small difference would be rounded away.
        return total.to(base.dtype if base.dtype.itemsize > 1 else torch.float32)

    return form
