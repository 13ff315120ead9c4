"""Parameters that a LoRA changes beside the weights of its modules: biases, norms, modulations, tables.

They are small. W′ = W0 + Σ s·ΔW is formed in fp32 and rounded once; the parameter's data points at it and is pointed
back at W0, whose storage is never written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from klora.engine.site import Site
from klora.engine.weights import preparing
from klora.errors import MismatchError
from klora.lora.deltas import Delta
from klora.lora.parameters import ParameterDelta

Change = Callable[[Tensor], Tensor]
"""From W0 to the difference ΔW of a LoRA, fp32 in its shape."""


Sum = Sequence[tuple[ParameterDelta, float]]
"""What a side makes of a parameter: its LoRAs' differences, each with a weight."""


class HeldParameter:
    """One parameter of a module, which points at W′ while a session is attached."""

    def __init__(self, module: Any, leaf: str, changes: Sequence[tuple[Change | None, Change | None]]) -> None:
        """Take the parameter `leaf` of `module`, and for each of what is to change it that of subject and style.

        Raises MismatchError where it is not a plain tensor.
        """
        self._module, self._leaf, self._changes = module, leaf, changes
        self._strengths = [(0.0, 0.0)] * len(changes)
        self._base: Tensor | None = None
        parameter = getattr(module, leaf)
        if not isinstance(parameter, nn.Parameter) or not parameter.is_floating_point() or parameter.is_meta:
            raise MismatchError(
                f"a LoRA changes the {leaf} of a {type(module).__name__}, which does not show it (quantised or"
                " offloaded); use an unquantised model without sequential offload"
            )

    def set(self, place: int, strengths: tuple[float, float]) -> None:
        """Let the change number `place` act with these strengths of subject and style."""
        if self._strengths[place] != strengths:
            self._strengths[place] = strengths
            if self._base is not None:
                self._point(self._base)

    def attach(self) -> None:
        """Point at W′; does nothing where that is done."""
        if self._base is None:
            self._base = getattr(self._module, self._leaf).data
            self._point(self._base)

    def detach(self) -> None:
        """Point back at W0, wherever the model has gone meanwhile; does nothing where that is done."""
        base, self._base = self._base, None
        if base is not None:
            parameter = getattr(self._module, self._leaf)
            parameter.data = base.to(parameter.device)

    def _point(self, base: Tensor) -> None:
        parameter = getattr(self._module, self._leaf)
        with preparing():
            total = base.float()
            for pair, strengths in zip(self._changes, self._strengths, strict=True):
                for change, strength in zip(pair, strengths, strict=True):
                    if change is not None and strength:
                        total = total + strength * change(base).to(total.device)
            parameter.data = total.to(parameter.device, base.dtype)


class HeldParameters:
    """All of a session's."""

    def __init__(self) -> None:
        self._held: list[HeldParameter] = []
        self._biases: dict[str, tuple[HeldParameter, int]] = {}

    def add_biases(self, sites: Mapping[str, Site], pairs: Mapping[str, tuple[Delta | None, Delta | None]]) -> None:
        """Take the biases of modules that have one, of which several may lie in one, by the deltas of both sides."""
        modules: dict[int, list[str]] = {}
        for name, pair in pairs.items():
            if name in sites and sites[name].has_bias and any(delta and delta.bias for delta in pair):
                modules.setdefault(id(sites[name].module), []).append(name)
        for names in modules.values():
            changes = []
            for name in names:
                subject, style = (_bias(delta, sites[name].rows) for delta in pairs[name])
                changes.append((subject, style))
            held = HeldParameter(sites[names[0]].module, "bias", changes)
            self._held.append(held)
            self._biases |= {name: (held, place) for place, name in enumerate(names)}

    def add(
        self,
        model: nn.Module,
        pairs: Mapping[str, tuple[Sum, Sum]],
        strengths: Callable[[Sum, Sum], tuple[float, float]],
    ) -> None:
        """Take parameters of a model by their path, to act all the time with the `strengths` of subject and style."""
        for path, (subject, style) in pairs.items():
            owner, _, leaf = path.rpartition(".")
            held = HeldParameter(model.get_submodule(owner), leaf, [(_sum(subject), _sum(style))])
            held.set(0, strengths(subject, style))
            self._held.append(held)

    def set(self, name: str, strengths: tuple[float, float]) -> None:
        """Let what a module's deltas do to its bias act with these strengths."""
        if name in self._biases:
            held, place = self._biases[name]
            held.set(place, strengths)

    def attach(self) -> None:
        """Point all at W′."""
        for held in self._held:
            held.attach()

    def detach(self) -> None:
        """Point all back at W0."""
        for held in self._held:
            held.detach()


def _sum(terms: Sum) -> Change | None:
    if not terms:
        return None

    def change(base: Tensor) -> Tensor:
        return torch.stack([delta.change(base) * weight for delta, weight in terms]).sum(0)

    return change


def _bias(delta: Delta | None, rows: tuple[int, int] | None) -> Change | None:
    bias = delta.bias if delta else None
    if bias is None:
        return None
    # Small, and wanted at each switch.
    own = bias.change()

    def change(base: Tensor) -> Tensor:
        start, stop = rows or (0, len(base))
        whole = torch.zeros(base.shape, dtype=torch.float32, device="cpu")
        whole[start:stop] = own
        return whole

    return change
