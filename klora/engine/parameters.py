"""Parameters that a LoRA changes beside the weights of its modules: norms, modulations, tables; biases in `held`.

They are small. W′ = W0 + Σ s·ΔW is formed in fp32 and rounded once; the parameter's data points at it and is pointed
back at W0, whose storage is never written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from klora.engine.weights import preparing
from klora.lora.parameters import ParameterDelta

Change = Callable[[Tensor], Tensor]
"""From W0 to its difference, fp32 in its shape."""
Sum = Sequence[tuple[ParameterDelta, float]]
"""What acts on a parameter: differences of LoRAs, each with what it is multiplied by."""

_MOVING = ("group_offloading", "layerwise_casting")
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

    def add(self, model: nn.Module, sums: Mapping[str, Sum]) -> None:
        """Take parameters of a model by their path, and what acts on each."""
        for path, terms in sums.items():
            owner, _, leaf = path.rpartition(".")
            self._held.append((HeldParameter(model.get_submodule(owner), leaf), _sum(terms)))

    def attach(self) -> None:
        """Point all at W′; does nothing where that is done."""
        for held, change in self._held:
            if held.base is None:
                held.point(change)

    def detach(self) -> None:
        """Point all back at W0."""
        for held, _ in self._held:
            held.point_back()


def unheld(model: nn.Module, paths: Iterable[str]) -> frozenset[str]:
    """Which of these of a model's parameters cannot point at something else: stored packed, moved at each forward."""
    return frozenset(path for path in paths if _is_out_of_reach(model, path))


def _is_out_of_reach(model: nn.Module, path: str) -> bool:
    found: Any = model
    for name in path.split("."):
        hooks = getattr(getattr(found, "_diffusers_hook", None), "hooks", {})
        if any(kind in hooks for kind in _MOVING):
            return True
        found = getattr(found, name, None)
    if found is None:
        # What the model does not have is said elsewhere.
        return False
    plain = isinstance(found, nn.Parameter) and type(found.data) is Tensor
    return not plain or not found.is_floating_point() or found.is_meta


def _sum(terms: Sum) -> Change:
    def change(base: Tensor) -> Tensor:
        return torch.stack([delta.change(base) * weight for delta, weight in terms]).sum(0)

    return change
