"""A LoRA or LoHa of rank 0, as trainers write it for a module that they left alone: ΔW = 0."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from klora.late import torch
from klora.lora.deltas.base import Factors, FamilyDelta, Group, squeeze

if TYPE_CHECKING:
    from torch import Tensor

_PAIRS = (("up", "down"), ("hada_w1_a", "hada_w1_b"))


@dataclass(eq=False)
class ZeroDelta(FamilyDelta):
    """ΔW = 0 of a shape; its rank counts as 1, as that of a product of zeros."""

    family = "zero"

    @classmethod
    def load(cls, group: Group) -> ZeroDelta | None:
        """Read factors (out, 0) and (0, in[, *kernel])."""
        for left, right in _PAIRS:
            up, down = group.tensors.get(left), group.tensors.get(right)
            if not up or not down or len(down.shape) < 2:
                continue
            if up.shape[1:2] == (0,) == down.shape[:1] and 0 not in (up.shape[0], *down.shape[1:]):
                group.used.update(group.tensors)
                group.used.update(group.numbers)
                return cls(group.file, group.key, 1, 0.0, 0.0, squeeze((up.shape[0], *down.shape[1:])))
        return None

    def factors(self) -> Factors:
        """Zeros."""
        shapes = ((self.shape[0], 1), (1, *self.shape[1:]))
        return Factors(*(torch.zeros(shape, dtype=torch.float32, device="cpu") for shape in shapes))

    def _fill(self, start: int, stop: int, block: Tensor) -> None:
        block.zero_()

    def _part(self, start: int, stop: int, shape: tuple[int, ...]) -> ZeroDelta:
        return replace(self, shape=shape)
