"""A delta on a layer that takes more channels than the one it was trained on: zeros for the channels it lacks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from klora.late import torch
from klora.lora.deltas.base import Factors, FileDelta
from klora.lora.source import Stored

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class WideDelta(FileDelta):
    """`source` (out, in, …), and zeros for further inputs."""

    source: FileDelta

    @classmethod
    def of(cls, source: FileDelta, shape: tuple[int, ...]) -> WideDelta:
        """Make `source` as wide as `shape`."""
        common = (source.file, source.key, source.rank, source.alpha, source.scale)
        return cls(*common, shape, source, bias=source.bias)

    @property
    def family(self) -> str:  # type: ignore[override]
        """That of the source."""
        return self.source.family

    @property
    def needs_base(self) -> bool:
        """As the source does."""
        return self.source.needs_base

    def times(self, weight: float) -> WideDelta:
        """weight·ΔW."""
        return self if weight == 1 else WideDelta.of(self.source.times(weight), self.shape)

    def factors(self) -> Factors | None:
        """Those of the source, the second with zeros in the columns that it lacks."""
        factors = self.source.factors()
        return factors and factors._replace(down=_widen(factors.down, self.shape[1]))

    def matrix(self, base_weight: Tensor | None = None) -> Tensor:
        """The source's; of a DoRA beside the columns of the weight that it knows."""
        known = None if base_weight is None else base_weight.reshape(self.shape)[:, : self.source.shape[1]]
        return _widen(self.source.matrix(known), self.shape[1])

    def stored(self) -> Iterator[Stored]:
        """Those of the source."""
        return self.source.stored()

    def unscored(self) -> Iterator[Stored]:
        """Those of the source."""
        return self.source.unscored()

    def _fill(self, start: int, stop: int, block: Tensor) -> None:
        rows = self.source.rows(start, stop).view(stop - start, *self.source.shape[1:])
        block.copy_(_widen(rows, self.shape[1]).reshape(block.shape))

    def _part(self, start: int, stop: int, shape: tuple[int, ...]) -> WideDelta:
        return replace(self, shape=shape, source=self.source.part(start, stop))


def _widen(tensor: Tensor, width: int) -> Tensor:
    """Zeros behind the channels (axis 1) of a tensor up to `width`."""
    behind = (0, 0) * (tensor.ndim - 2) + (0, width - tensor.shape[1])
    return torch.nn.functional.pad(tensor, behind)
