"""DoRA (arXiv 2402.09353): W' = m · (W0 + ΔW) / ‖W0 + ΔW‖, with ΔW, the direction, of any low-rank family."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from klora.errors import MismatchError, UnsupportedFormatError
from klora.late import torch
from klora.lora.deltas.base import WEIGHT, FamilyDelta, FileDelta, Group, size
from klora.lora.deltas.loha import LohaDelta
from klora.lora.deltas.lokr import LokrDelta
from klora.lora.deltas.lora import LoraDelta
from klora.lora.source import Stored

if TYPE_CHECKING:
    from torch import Tensor

_DIRECTIONS: tuple[type[FamilyDelta], ...] = (LoraDelta, LohaDelta, LokrDelta)


@dataclass(eq=False)
class DoraDelta(FamilyDelta):
    """`magnitude` is one number per output row, or per input column where `by_column` (LyCORIS' older default).

    What acts is `weight` times W' − W0.
    """

    direction: FileDelta
    magnitude: Stored
    by_column: bool
    weight: float = 1.0

    family = "dora"

    @classmethod
    def load(cls, group: Group) -> DoraDelta | None:
        """Read dora_scale or lora_magnitude_vector beside a direction; LoraFileError where they do not fit."""
        slot = next((slot for slot in ("dora_scale", "magnitude") if slot in group), None)
        direction = next((d for kind in _DIRECTIONS if (d := kind.load(group))), None) if slot else None
        if slot is None or direction is None:
            return None
        magnitude = group.take(slot, 1, *WEIGHT)
        count = math.prod(magnitude.shape)
        out, columns = direction.shape[:2]
        # A kernel that is stored flat leaves its area in the columns.
        flat = len(magnitude.shape) > 2 and len(direction.shape) == 2
        fits_inputs = columns % count == 0 if flat else columns == count
        # LyCORIS writes (out, 1…) or (1, in, 1…); PEFT always one per output, (out,) or (1, out, 1, 1), which others
        # take over as (1, out): where a layer is square, (1, n) is LyCORIS'.
        per_row = count == out and (slot == "magnitude" or magnitude.shape[0] == out or not fits_inputs)
        if not per_row and (slot == "magnitude" or not fits_inputs):
            raise group.error(magnitude, f"is {size(magnitude.shape)}, for a direction of {size(direction.shape)}")
        common = (group.file, group.key, direction.rank, direction.alpha, direction.scale, direction.shape)
        return cls(*common, direction, magnitude.view(count), by_column=not per_row)

    @property
    def needs_base(self) -> bool:
        """Always."""
        return True

    def matrix(self, base_weight: Tensor | None = None) -> Tensor:
        """W' − W0 on the device of the `base_weight` W0, fp32; ValueError without one, MismatchError for its shape."""
        if base_weight is None:
            raise ValueError(f"{self.key} is a DoRA: its difference depends on the weight it is applied to")
        if base_weight.numel() != self.direction.columns * self.shape[0]:
            raise MismatchError(
                f"{self.file}: {self.key}: is {size(self.shape)} and the model's weight is"
                f" {size(tuple(base_weight.shape))}; use a LoRA made for this model"
            )
        self._check_inputs(self.shape)
        base = base_weight.detach().float().reshape(self.shape)
        changed = base + self.direction.matrix().to(base.device)
        dims = [dim for dim in range(len(self.shape)) if dim != int(self.by_column)]
        norm = torch.linalg.vector_norm(changed, dim=dims, keepdim=True)
        magnitude = self.magnitude.fp32().to(base.device).view(norm.shape)
        changed.mul_(magnitude / norm.clamp_min(torch.finfo(torch.float32).eps)).sub_(base)
        return changed if self.weight == 1 else changed.mul_(self.weight)

    def times(self, weight: float) -> DoraDelta:
        """weight·(W' − W0); the direction is scored with that weight too."""
        return (
            self
            if weight == 1
            else replace(self, weight=self.weight * weight, bias=self.bias and self.bias.times(weight))
        )

    def stored(self) -> Iterator[Stored]:
        """The direction's tensors and the magnitude."""
        yield from self.direction.stored()
        yield self.magnitude
        if self.bias:
            yield from self.bias.stored()

    def unscored(self) -> Iterator[Stored]:
        """The magnitude, since the direction alone is scored."""
        yield from self.direction.unscored()
        yield self.magnitude
        if self.bias:
            yield from self.bias.stored()

    def shaped(self, shape: tuple[int, ...]) -> DoraDelta:
        """The same in another shape of as many columns; MismatchError where its magnitudes are of other inputs."""
        self._check_inputs(shape)
        return replace(self, shape=shape, direction=self.direction.shaped(shape))

    def _check_inputs(self, shape: tuple[int, ...]) -> None:
        count = self.magnitude.shape[0]
        if self.by_column and count != shape[1]:
            raise MismatchError(
                f"{self.file}: {self.magnitude.key}: has magnitudes of {count} inputs, the layer has {shape[1]}; use a"
                " LoRA made for this model"
            )

    def _fill(self, start: int, stop: int, block: Tensor) -> None:
        self.direction.rows(start, stop, out=block)
        if self.weight != 1:
            block.mul_(self.weight)

    def _part(self, start: int, stop: int, shape: tuple[int, ...]) -> DoraDelta:
        if self.by_column:
            raise UnsupportedFormatError(
                self.file,
                "is a DoRA with one magnitude per column of a fused weight, which cannot be split into q, k and v",
                "use a file with split q, k, v or trained with wd_on_output",
                self.magnitude.key,
            )
        magnitude = self.magnitude.rows(start, stop)
        return replace(self, shape=shape, direction=self.direction.part(start, stop), magnitude=magnitude)
