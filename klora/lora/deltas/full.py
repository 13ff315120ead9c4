"""Full differences (`.diff`, LyCORIS "full"): ΔW itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from klora.lora.deltas.base import FULL_RANK, FileDelta, Group, squeeze
from klora.lora.source import Stored


@dataclass(eq=False)
class FullDelta(FileDelta):
    """`diff` is (out, in[, kh, kw]); the scale is a file's 1, and the rank counts as min(out, in, 64)."""

    diff: Stored

    family = "full"

    @classmethod
    def load(cls, group: Group) -> FullDelta | None:
        """Read `.diff` of a weight; one-dimensional differences (norms, biases) are not a matrix and are left."""
        if "diff" not in group or len(group.tensors["diff"].shape) == 1:
            return None
        diff = group.take("diff", 2, 4)
        shape = squeeze(diff.shape)
        rank = min(*shape[:2], FULL_RANK)
        return cls(group.file, group.key, rank, float(rank), 1.0, shape, diff.view(*shape))

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
