"""Deltas that no file holds: what a policy makes of those that files do hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klora.lora.deltas.base import Delta, Factors
from klora.lora.deltas.lora import LoraDelta
from klora.lora.source import Stored


def low_rank(delta: Delta) -> tuple[Tensor, Tensor] | None:
    """Unscaled factors as two matrices, up (out, r) and down (r, in·kh·kw), fp32; None for a family without them."""
    if isinstance(delta, FactorDelta):
        return delta.up, delta.down.reshape(delta.rank, -1)
    if not isinstance(delta, LoraDelta):
        return None
    return delta.up.fp32(), delta.flat_down()


@dataclass(eq=False)
class FactorDelta(Delta):
    """scale·up·down of tensors, fp32: up (out, r), down (r, in[, kh, kw])."""

    up: Tensor
    down: Tensor

    family = "lora"

    @classmethod
    def like(cls, delta: Delta, up: Tensor, down: Tensor, scale: float) -> FactorDelta:
        """Make one in the place of `delta`, of up (out, r) and down (r, in·kh·kw)."""
        rank = up.shape[1]
        down = down.reshape(rank, *delta.shape[1:])
        return cls(delta.file, delta.key, rank, scale * rank, scale, delta.shape, up, down)

    def factors(self) -> Factors | None:
        """The tensors."""
        return Factors(self.up, self.down)

    def _fill(self, start: int, stop: int, block: Tensor) -> None:
        down = self.down.reshape(self.rank, -1)
        torch.addmm(block, self.up[start:stop], down, beta=0, alpha=self.scale, out=block)

    def _part(self, start: int, stop: int, shape: tuple[int, ...]) -> FactorDelta:
        return replace(self, shape=shape, up=self.up[start:stop])


@dataclass(eq=False)
class ProjectedDelta(Delta):
    """ΔW·(I − f·Q·Qᵀ) of another delta without factors: f is `fraction`, Q is `basis` (in·kh·kw, q), orthonormal."""

    source: Delta
    basis: Tensor
    fraction: float

    family = "projected"

    def stored(self) -> Iterator[Stored]:
        """Those of the source."""
        return self.source.stored()

    @property
    def is_stored_whole(self) -> bool:
        """As the source is."""
        return self.source.is_stored_whole

    def _fill(self, start: int, stop: int, block: Tensor) -> None:
        self.source.rows(start, stop, out=block)
        block.addmm_(block @ self.basis, self.basis.t(), alpha=-self.fraction)

    def _part(self, start: int, stop: int, shape: tuple[int, ...]) -> ProjectedDelta:
        return replace(self, shape=shape, source=self.source.part(start, stop))
