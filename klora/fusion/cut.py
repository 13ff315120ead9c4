"""Cutting a difference of weights to a low rank by SVD, and what is lost by that."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from klora.lora.deltas import Delta
from klora.lora.deltas.computed import FactorDelta, low_rank

SMALL = 256
"""Up to this many rows or columns, an SVD is exact and quick."""
MORE, ROUNDS = 10, 2
"""Directions beyond the rank, and power iterations, of a randomised SVD (Halko et al., arXiv 0909.4061)."""


class Cut(NamedTuple):
    """A delta of low rank, the energy ‖ΔW‖_F² that was there, and how much of it was lost."""

    delta: FactorDelta
    energy: float
    lost: float

    @property
    def lost_share(self) -> float:
        """The fraction of the energy that was lost."""
        return self.lost / self.energy if self.energy else 0.0


def cut(delta: Delta, rank: int) -> Cut:
    """The nearest delta of at most `rank`, in the place of `delta`; exact from its factors where it has any."""
    factors = low_rank(delta)
    if factors is None:
        return _cut_dense(delta, rank)
    up, down = factors
    U, S, V = svd_of_product(up * delta.scale, down)
    return _made(delta, U, S, V, rank, float(S.square().sum()))


def svd_of_product(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,), V (n, r), fp64, of up (out, r) times down (r, n), without forming the product."""
    Q_out, R_out = torch.linalg.qr(up.double())
    Q_in, R_in = torch.linalg.qr(down.double().t())
    U, S, Vh = torch.linalg.svd(R_out @ R_in.t(), full_matrices=False)
    return Q_out @ U, S, Q_in @ Vh.t()


def _cut_dense(delta: Delta, rank: int) -> Cut:
    W = delta.matrix().reshape(delta.shape[0], -1)
    energy = float(W.double().square().sum())
    small = min(W.shape)
    if small <= SMALL or 2 * (rank + MORE) >= small:
        U, S, Vh = torch.linalg.svd(W.double() if small <= SMALL else W, full_matrices=False)
        return _made(delta, U, S, Vh.t(), rank, energy)
    return _made(delta, *_randomised_svd(W, rank), rank, energy)


def _randomised_svd(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    # Always the same directions, so that a file that is made again is the same.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(W.shape[1], rank + MORE, generator=generator, dtype=torch.float32, device="cpu")
    Q = torch.linalg.qr(W @ drawn).Q
    for _ in range(ROUNDS):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.t() @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.t() @ W, full_matrices=False)
    return Q @ U, S, Vh.t()


def _made(delta: Delta, U: Tensor, S: Tensor, V: Tensor, rank: int, energy: float) -> Cut:
    rank = max(1, min(rank, len(S)))
    root = S[:rank].sqrt()
    made = FactorDelta.like(
        delta, (U[:, :rank] * root).float().contiguous(), (V[:, :rank] * root).t().float().contiguous(), 1.0
    )
    return Cut(made, energy, max(0.0, energy - float(S[:rank].double().square().sum())))
