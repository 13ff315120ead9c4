"""Deltas that no file holds: sums of those that files do hold, and what policies make of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from klora.late import torch
from klora.lora.deltas.base import Bias, Delta, Factors, FileDelta
from klora.lora.deltas.lora import LoraDelta
from klora.lora.deltas.wide import WideDelta
from klora.lora.deltas.zero import ZeroDelta
from klora.lora.source import Stored

if TYPE_CHECKING:
    from torch import Tensor


def low_rank(delta: Delta) -> tuple[Tensor, Tensor] | None:
    """Unscaled factors as two matrices, up (out, r) and down (r, in·kh·kw), fp32; None for a family without them."""
    if isinstance(delta, FactorDelta):
        return delta.up, delta.down.reshape(delta.rank, -1)
    if isinstance(delta, SumDelta):
        return delta.side_by_side()
    if isinstance(delta, (WideDelta, ZeroDelta)) and (factors := delta.factors()) and factors.mid is None:
        return factors.up.float(), factors.down.float().reshape(delta.rank, -1)
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
class SumDelta(Delta):
    """Σ ΔW of several `terms`; where all of these are low-rank it is too, of the sum of their ranks.

    The scale is 1: those of the terms are theirs. A sum with a DoRA needs the base weight, as that does.
    """

    terms: tuple[FileDelta, ...]

    family = "sum"

    @classmethod
    def of(cls, terms: Sequence[FileDelta]) -> SumDelta:
        """The sum of deltas of one shape, in the place of the first."""
        first, rank = terms[0], sum(term.rank for term in terms)
        biases = [term.bias for term in terms if term.bias]
        bias = Bias(tuple(each for one in biases for each in one.terms)) if biases else None
        return cls(first.file, first.key, rank, float(rank), 1.0, first.shape, tuple(terms), bias=bias)

    @property
    def needs_base(self) -> bool:
        """As a term does."""
        return any(term.needs_base for term in self.terms)

    @property
    def is_stored_whole(self) -> bool:
        """As a term is."""
        return any(term.is_stored_whole for term in self.terms)

    def side_by_side(self) -> tuple[Tensor, Tensor] | None:
        """up (out, Σ r), the scales in it, and down (Σ r, in·kh·kw), fp32; None where a term is not low-rank."""
        found = [(factors, term.scale) for term in self.terms if (factors := low_rank(term))]
        if len(found) < len(self.terms):
            return None
        ups = [up if scale == 1 else up * scale for (up, _), scale in found]
        return torch.cat(ups, dim=1), torch.cat([down for (_, down), _ in found])

    def factors(self) -> Factors | None:
        """The terms' factors side by side, fp32; None where a term is not low-rank."""
        factors = self.side_by_side()
        return factors and Factors(factors[0], factors[1].reshape(self.rank, *self.shape[1:]))

    def matrix(self, base_weight: Tensor | None = None) -> Tensor:
        """The whole sum, on the device of the `base_weight` where a term needs one."""
        if not self.needs_base:
            return super().matrix()
        matrices = [term.matrix(base_weight) for term in self.terms]
        device = base_weight.device if base_weight is not None else None
        return torch.stack([matrix.to(device) for matrix in matrices]).sum(0)

    def stored(self) -> Iterator[Stored]:
        """Those of the terms."""
        for term in self.terms:
            yield from term.stored()

    def check_finite(self, scored: bool = False) -> None:
        """Look at every term, so that what is said names its file."""
        for term in self.terms:
            term.check_finite(scored)

    def _fill(self, start: int, stop: int, block: Tensor) -> None:
        first, *others = self.terms
        first.rows(start, stop, out=block)
        for term in others:
            term.add_rows(start, stop, block)

    def _part(self, start: int, stop: int, shape: tuple[int, ...]) -> SumDelta:
        return replace(self, shape=shape, terms=tuple(term.part(start, stop) for term in self.terms))


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
