"""Parameters that a LoRA changes beside the weights of its modules: norms, modulations, tables; biases in `held`.

They are small. W′ = W0 + Σ s·ΔW is formed in fp32 and rounded once; the parameter's data points at it and is pointed
back at W0, whose storage is never written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from klora.engine.weights import preparing
from klora.lora.parameters import ParameterDelta

Change = Callable[[Tensor], Tensor]
"""From W0 to its difference, fp32 in its shape."""
Models = Mapping[str, nn.Module]
"""The denoiser under an empty name, and text encoders under the names that paths in them begin with."""
Sum = Sequence[tuple[ParameterDelta, float]]
"""What acts on a parameter: differences of LoRAs, each with what it is multiplied by."""

_MOVING = {"group_offloading", "layerwise_casting"}
"""diffusers' hooks that exchange the data of parameters at each forward."""


class HeldParameter:
    """One parameter of a module, which points at W′ while that is wanted."""

    def __init__(self, module: Any, leaf: str) -> None:
        self._module, self._leaf = module, leaf
        self.base: Tensor | None = None
        """W0, while W′ stands in its place."""
        self._version = 0

    @property
    def _parameter(self) -> nn.Parameter:
        parameter: nn.Parameter = getattr(self._module, self._leaf)
        return parameter

    def point(self, change: Change) -> None:
        """Point at W0 + change(W0)."""
        parameter = self._parameter
        if self.base is None or parameter._version != self._version:
            # Whatever is loaded into the model meanwhile is its own from then on.
            self.base, self._version = parameter.data, parameter._version
        with preparing():
            total = self.base.float() + change(self.base).to(self.base.device)
            # In fp8, which layers cast at each forward, a small difference would be rounded away.
            dtype = self.base.dtype if self.base.dtype.itemsize > 1 else torch.float32
            parameter.data = total.to(parameter.device, dtype)

    def point_back(self) -> None:
        """Point at W0, wherever the model has gone meanwhile; does nothing where that is done."""
        base, self.base = self.base, None
        parameter = self._parameter
        if base is not None and parameter._version == self._version:
            parameter.data = base.to(parameter.device)


class HeldParameters:
    """All of a session's that are no biases: they act all the time."""

    def __init__(self) -> None:
        self._held: list[tuple[HeldParameter, Change]] = []

    def add(self, models: Models, sums: Mapping[str, Sum]) -> None:
        """Take parameters by their path, and what acts on each."""
        for path, terms in sums.items():
            *_, owner, _ = _on_the_way(models, path)
            self._held.append((HeldParameter(owner, path.rpartition(".")[2]), _sum(terms)))

    def attach(self) -> None:
        """Point all at W′; does nothing where that is done."""
        for held, change in self._held:
            if held.base is None:
                held.point(change)

    def detach(self) -> None:
        """Point all back at W0."""
        for held, _ in self._held:
            held.point_back()


def unheld(models: Models, paths: Iterable[str]) -> frozenset[str]:
    """Which of these parameters cannot point at something else: stored packed, or moved at each forward."""
    return frozenset(path for path in paths if _is_out_of_reach(models, path))


def _is_out_of_reach(models: Models, path: str) -> bool:
    *owners, parameter = _on_the_way(models, path)
    hooks = {kind for owner in owners for kind in getattr(getattr(owner, "_diffusers_hook", None), "hooks", ())}
    plain = isinstance(parameter, nn.Parameter) and type(parameter.data) is Tensor
    return not plain or not parameter.is_floating_point() or parameter.is_meta or bool(hooks & _MOVING)


def _on_the_way(models: Models, path: str) -> list[Any]:
    """The modules that a parameter is in, from its model on, and last itself."""
    component, *rest = path.split(".")
    found, names = (models[component], rest) if component in models else (models[""], path.split("."))
    if names[0] == "text_model" and not hasattr(found, "text_model"):
        names = names[1:]
    return list(accumulate(names, getattr, initial=found))


def _sum(terms: Sum) -> Change:
    def change(base: Tensor) -> Tensor:
        return torch.stack([delta.change(base) * weight for delta, weight in terms]).sum(0)

    return change
