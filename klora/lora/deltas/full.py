"""Full differences (`.diff`, LyCORIS "full"): ΔW itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from klora.lora.deltas.base import FULL_RANK, WEIGHT, FamilyDelta, Group, squeeze
from klora.lora.source import Stored

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class FullDelta(FamilyDelta):
    """`diff` is (out, in[, kh, kw]); the scale is a file's 1, and the rank counts as min(out, in, 64)."""

    diff: Stored

    family = "full"

    @classmethod
    def load(cls, group: Group) -> FullDelta | None:
        """Read `.diff` of a weight; others (norms, modulations) are not a matrix and are left."""
        if "diff" not in group or len(group.tensors["diff"].shape) in (1, 3):
            return None
        diff = group.take("diff", *WEIGHT)
        shape = squeeze(diff.shape)
        rank = min(*shape[:2], FULL_RANK)
        return cls(group.file, group.key, rank, *group.scaling(rank, whole=True), shape, diff.view(*shape))

    @property
    def is_stored_whole(self) -> bool:
        """It is ΔW."""
        return True

    def _fill(self, start: int, stop: int, block: Tensor) -> None:
        block.copy_(self.diff.data()[start:stop].reshape(block.shape))
        if self.scale != 1:
            block.mul_(self.scale)

    def _part(self, start: int, stop: int, shape: tuple[int, ...]) -> FullDelta:
        return replace(self, shape=shape, diff=self.diff.rows(start, stop))
