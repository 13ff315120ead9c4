"""LoKr (LyCORIS): ΔW = w1 ⊗ w2 (Kronecker), each whole or as a product of two, w2 optionally with a core t2."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from klora.late import torch
from klora.lora.deltas.base import (
    FULL_RANK,
    KERNEL,
    WEIGHT,
    FamilyDelta,
    Group,
    cp_down,
    size,
    squeeze,
    with_kernel,
)
from klora.lora.source import Stored

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class LokrDelta(FamilyDelta):
    """w1 (a, b) and w2 (c, d[, kh, kw]) give (a·c, b·d[, kh, kw]); `row` is the first row of it that is meant.

    `w1` and `w2` hold either the whole factor or a pair (left, right): w1 (a, r)·(r, b), w2 (c, r)·(r, d·kh·kw), and
    with the core `t2` (r, r, kh, kw), w2 is (r, c) and (r, d).
    """

    w1: Stored
    w2: Stored
    w1_right: Stored | None = None
    w2_right: Stored | None = None
    t2: Stored | None = None
    row: int = 0

    family = "lokr"

    @classmethod
    def load(cls, group: Group) -> LokrDelta | None:
        """Read lokr_*; LoraFileError where a tensor is missing or they do not multiply.

        The rank is the file's dim. Where both factors are whole there is none: the scale is 1, as in LyCORIS, and the
        rank counts as min(out, in, 64).
        """
        if not any(slot.startswith("lokr_") for slot in group.tensors):
            return None
        w1, w1_right = _factor(group, "lokr_w1")
        w2, w2_right = _factor(group, "lokr_w2", *WEIGHT)
        t2 = group.take("lokr_t2", *KERNEL) if "lokr_t2" in group else None
        if w1_right and w1.shape[1] != w1_right.shape[0]:
            raise _mismatch(group, w1, w1_right)
        inner = _second_shape(group, w2, w2_right, t2)
        outer = (w1.shape[0], (w1_right or w1).shape[1])
        shape = (outer[0] * inner[0], outer[1] * inner[1], *inner[2:])
        # Where the kernel is flat, its area divides the columns of w1, of w2 or of both.
        shape = squeeze(shape) if inner[2:] else with_kernel(shape[0], shape[1], group.kernel)
        right = w1_right or w2_right
        rank = right.shape[0] if right else min(*shape[:2], FULL_RANK)
        alpha, scale = group.scaling(rank, whole=right is None)
        return cls(group.file, group.key, rank, alpha, scale, shape, w1, w2, w1_right, w2_right, t2)

    def kronecker(self) -> tuple[Tensor, ...] | None:
        """The factors in the file's dtype, w1 of two in fp32; None for kernels, cores and slices of a fused weight."""
        whole = self.w1.shape[0] * self.w2.shape[0] == self.shape[0]
        if len(self.shape) != 2 or self.t2 is not None or not whole:
            return None
        w1 = self.w1.native() if self.w1_right is None else self.w1.fp32() @ self.w1_right.fp32()
        w2 = self.w2.native().flatten(1)
        return (w1, w2) if self.w2_right is None else (w1, self.w2_right.native(), w2)

    def _fill(self, start: int, stop: int, block: Tensor) -> None:
        height = self.w2.shape[0] if self.t2 is None else self.w2.shape[1]
        rows = torch.arange(self.row + start, self.row + stop, device="cpu")
        w1 = self._first(rows // height) * self.scale
        w2, place = self._second(rows % height, height)
        torch.mul(w1[:, :, None], w2[place][:, None, :], out=block.view(len(rows), w1.shape[1], w2.shape[1]))

    def _first(self, rows: Tensor) -> Tensor:
        """These rows of w1, fp32; no others are formed."""
        first, last = int(rows[0]), int(rows[-1]) + 1
        w1 = self.w1.data()[first:last].float()
        return (w1 if self.w1_right is None else w1 @ self.w1_right.fp32())[rows - first]

    def _second(self, rows: Tensor, height: int) -> tuple[Tensor, Tensor]:
        """(w2 rows, the place of each wanted row among them): no more rows of w2 than are wanted."""
        each = torch.arange(min(len(rows), height), device="cpu")
        wanted, place = (rows, each) if len(rows) < height else (each, rows)
        if self.w2_right is None:
            return self.w2.native()[wanted].float().reshape(len(wanted), -1), place
        right = self.w2_right.fp32()
        if self.t2 is None:
            return self.w2.native()[wanted].float() @ right, place
        return self.w2.native()[:, wanted].float().t() @ cp_down(self.t2.fp32(), right), place

    def _part(self, start: int, stop: int, shape: tuple[int, ...]) -> LokrDelta:
        return replace(self, shape=shape, row=self.row + start)


def _factor(group: Group, slot: str, *dims: int) -> tuple[Stored, Stored | None]:
    """A whole factor and None, or its pair."""
    if slot in group:
        return group.take(slot, *dims), None
    return group.take(f"{slot}_a"), group.take(f"{slot}_b")


def _second_shape(group: Group, w2: Stored, right: Stored | None, core: Stored | None) -> tuple[int, ...]:
    if right is None:
        if core:
            raise group.error(core, "is a core without lokr_w2_a and lokr_w2_b")
        return w2.shape
    rank, columns = right.shape
    if core is None:
        if w2.shape[1] != rank:
            raise _mismatch(group, w2, right)
        return (w2.shape[0], columns)
    if core.shape[:2] != (w2.shape[0], rank):
        raise _mismatch(group, core, right)
    return (w2.shape[1], columns, *core.shape[2:])


def _mismatch(group: Group, a: Stored, b: Stored) -> Exception:
    return group.error(a, f"is {size(a.shape)} and {b.key} is {size(b.shape)}: they do not multiply")
