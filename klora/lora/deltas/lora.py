"""LoRA and LoCon: ΔW = up·down, for convolutions with the kernel in `down`, or in `mid` (CP decomposition)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from klora.late import torch
from klora.lora.deltas.base import KERNEL, WEIGHT, Factors, FamilyDelta, Group, cp_down, size, squeeze
from klora.lora.source import Stored

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class LoraDelta(FamilyDelta):
    """`up` is (out, r), `down` (r, in[, kh, kw]); with `mid` (r, r, kh, kw), `down` is (r, in)."""

    up: Stored
    down: Stored
    mid: Stored | None = None

    family = "lora"

    @classmethod
    def load(cls, group: Group) -> LoraDelta | None:
        """Read lora_down, lora_up (and lora_mid); LoraFileError where one is missing or they do not multiply."""
        if "down" not in group and "up" not in group:
            return None
        down, up = group.take("down", *WEIGHT), group.take("up", *WEIGHT)
        mid = group.take("mid", *KERNEL) if "mid" in group else None
        rank = down.shape[0]
        if up.shape[1] != rank or any(side != 1 for side in up.shape[2:]):
            raise group.error(up, f"is {size(up.shape)} and {down.key} is {size(down.shape)}: they do not multiply")
        up, down = up.view(*up.shape[:2]), down.view(*squeeze(down.shape))
        kernel = down.shape[2:]
        if mid is not None:
            if mid.shape[:2] != (rank, rank) or kernel:
                raise group.error(
                    mid, f"is {size(mid.shape)} and {down.key} is {size(down.shape)}: they do not multiply"
                )
            kernel = mid.shape[2:]
        alpha, scale = group.scaling(rank)
        shape = squeeze((up.shape[0], down.shape[1], *kernel))
        return cls(group.file, group.key, rank, alpha, scale, shape, up, down, mid)

    def factors(self) -> Factors | None:
        """The tensors up, down and mid as they are stored; None for a 1×1 core, which a Linear could not apply."""
        if self.mid and len(self.shape) == 2:
            return None
        return Factors(self.up.native(), self.down.native(), self.mid.native() if self.mid else None)

    def shaped(self, shape: tuple[int, ...]) -> LoraDelta:
        """The same in another shape of as many columns."""
        down = self.down if self.mid else self.down.view(self.rank, *shape[1:])
        return replace(self, shape=shape, down=down)

    def flat_down(self) -> Tensor:
        """The second factor as one matrix, core included: (r, in·kh·kw), fp32."""
        down = self.down.fp32()
        return down.reshape(self.rank, -1) if self.mid is None else cp_down(self.mid.fp32(), down)

    def add_rows(self, start: int, stop: int, block: Tensor) -> None:
        """Add the rows [start, stop) of scale·ΔW to `block`, as part of the product."""
        block.addmm_(self.up.data()[start:stop].float(), self.flat_down(), alpha=self.scale)

    def _fill(self, start: int, stop: int, block: Tensor) -> None:
        up = self.up.data()[start:stop].float()
        torch.addmm(block, up, self.flat_down(), beta=0, alpha=self.scale, out=block)

    def _part(self, start: int, stop: int, shape: tuple[int, ...]) -> LoraDelta:
        return replace(self, shape=shape, up=self.up.rows(start, stop))
