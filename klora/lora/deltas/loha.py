"""LoHa (arXiv 2108.06098, LyCORIS): ΔW = (w1_a·w1_b) ⊙ (w2_a·w2_b), for kernels optionally with cores t1 and t2."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from klora.errors import LoraFileError
from klora.late import torch
from klora.lora.deltas.base import KERNEL, FamilyDelta, Group, cp_down, size, squeeze, with_kernel
from klora.lora.source import Stored

if TYPE_CHECKING:
    from torch import Tensor

_SLOTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


@dataclass(eq=False)
class LohaDelta(FamilyDelta):
    """`w1_a` is (out, r), `w1_b` (r, in·kh·kw); with the core `t1` (r, r, kh, kw): (r, out) and (r, in). 2 likewise.

    `row` is the first row of the product that is meant.
    """

    w1_a: Stored
    w1_b: Stored
    w2_a: Stored
    w2_b: Stored
    t1: Stored | None = None
    t2: Stored | None = None
    row: int = 0

    family = "loha"

    @classmethod
    def load(cls, group: Group) -> LohaDelta | None:
        """Read hada_*; LoraFileError where a tensor is missing or they do not multiply. The rank is the file's dim."""
        if not any(slot.startswith("hada_") for slot in group.tensors):
            return None
        w1_a, w1_b, w2_a, w2_b = (group.take(slot) for slot in _SLOTS)
        cores = [group.take(slot, *KERNEL) for slot in _CORES] if any(slot in group for slot in _CORES) else [None] * 2
        shapes = [_shape(group, *factor) for factor in ((w1_a, w1_b, cores[0]), (w2_a, w2_b, cores[1]))]
        if shapes[0] != shapes[1]:
            reason = f"its two halves are {size(shapes[0])} and {size(shapes[1])}: they do not multiply"
            raise LoraFileError(group.file, reason, "the file is damaged: download or export it again", w2_a.key)
        rank = w1_b.shape[0]
        alpha, scale = group.scaling(rank)
        return cls(group.file, group.key, rank, alpha, scale, shapes[0], w1_a, w1_b, w2_a, w2_b, *cores)

    def _fill(self, start: int, stop: int, block: Tensor) -> None:
        rows = slice(self.row + start, self.row + stop)
        torch.addmm(block, *_half(self.w1_a, self.w1_b, self.t1, rows), beta=0, alpha=self.scale, out=block)
        left, right = _half(self.w2_a, self.w2_b, self.t2, rows)
        block.mul_(left @ right)

    def _part(self, start: int, stop: int, shape: tuple[int, ...]) -> LohaDelta:
        return replace(self, shape=shape, row=self.row + start)


def _half(a: Stored, b: Stored, core: Stored | None, rows: slice) -> tuple[Tensor, Tensor]:
    """The factors of these rows of one half, fp32."""
    if core is None:
        return a.data()[rows].float(), b.fp32()
    return a.data()[:, rows].float().t(), cp_down(core.fp32(), b.fp32())


def _shape(group: Group, a: Stored, b: Stored, core: Stored | None) -> tuple[int, ...]:
    """The shape that one half gives, squeezed."""
    rank, columns = b.shape
    if core is None:
        fits, shape = a.shape[1] == rank, with_kernel(a.shape[0], columns, group.kernel)
    else:
        fits, shape = core.shape[:2] == (a.shape[0], rank), squeeze((a.shape[1], columns, *core.shape[2:]))
    if not fits:
        raise group.error(a, f"is {size(a.shape)} and {b.key} is {size(b.shape)}: they do not multiply")
    return shape
