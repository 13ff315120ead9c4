"""KnOTS (arXiv 2410.19735): two differences of weights in one basis, where TIES merges them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from klora.fusion.cut import svd_of_product
from klora.fusion.entries import elected_mean, largest, refuse_dora
from klora.lora.deltas import Delta
from klora.lora.deltas.computed import FactorDelta, low_rank

EPSILON = 1e-6
"""Singular values below this fraction of the largest are none."""


def shared_basis(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """U (out, q) and the S·V_iᵀ (q, n) of [ΔW_1 ΔW_2 …] = U·S·[V_1 V_2 …]ᵀ, fp64, of the ΔW_i = up·down in `factors`.

    The concatenation is never formed: its left factor is all `up` side by side, its right one has all `down` in blocks.
    """
    ups = torch.cat([up.double() for up, _ in factors], dim=1)
    blocks = torch.block_diag(*(down.double() for _, down in factors))
    U, S, V = svd_of_product(ups, blocks)
    least = EPSILON * float(S.max())
    there = least < S
    widths = [down.shape[1] for _, down in factors]
    shares = (V[:, there] * S[there]).t()
    # Rounding leaves no exact zeros, and TIES counts what is not zero.
    shares = shares * (shares.abs() > EPSILON * least)
    return U[:, there], list(shares.split(widths, dim=1))


def tie(deltas: Sequence[Delta], strengths: Sequence[float], density: float) -> FactorDelta:
    """TIES of the deltas' S·V_iᵀ, times U, in the place of the first; rank at most the sum of the ranks.

    Raises MismatchError for DoRA, whose difference depends on the weight it is applied to.
    """
    refuse_dora(deltas)
    factors = [_factors(delta, strength) for delta, strength in zip(deltas, strengths, strict=True)]
    U, shares = shared_basis(factors)
    trimmed = [share * (share.abs() >= largest(share, density)) for share in shares] if U.shape[1] else shares
    merged = elected_mean(torch.stack(trimmed))
    if not U.shape[1]:
        U, merged = U.new_zeros(U.shape[0], 1), merged.new_zeros(1, merged.shape[1])
    return FactorDelta.like(deltas[0], U.float(), merged.float().contiguous(), 1.0)


def _factors(delta: Delta, strength: float) -> tuple[Tensor, Tensor]:
    factors = low_rank(delta)
    if factors is None:
        W = delta.matrix().reshape(delta.shape[0], -1)
        narrow = torch.eye(min(W.shape), dtype=W.dtype, device=W.device)
        factors = (narrow, W) if W.shape[0] <= W.shape[1] else (W, narrow)
        return factors[0] * strength, factors[1]
    return factors[0] * (delta.scale * strength), factors[1]
