"""NP-LoRA's projection (arXiv 2511.11051): shrink what a subject does inside the style's row space."""

from __future__ import annotations

import torch
from torch import Tensor

from klora.fusion.entries import refuse_dora
from klora.lora.deltas import Delta
from klora.lora.deltas.computed import FactorDelta, ProjectedDelta, low_rank


def orthonormal(A: Tensor) -> Tensor:
    """Q = orth(Aᵀ): an orthonormal basis (n, q) of the row space of A (r, n); q is its numerical rank in fp32."""
    Q, R = torch.linalg.qr(A.double().t())
    U, sigma, _ = torch.linalg.svd(R, full_matrices=False)
    tolerance = torch.finfo(torch.float32).eps * max(A.shape)
    basis: Tensor = (Q @ U[:, sigma > tolerance * sigma.max()]).float()
    return basis


def shrink(A: Tensor, Q: Tensor, mu: float) -> Tensor:
    """A·(I − μ/(1+μ)·Q·Qᵀ): rows of A (r, n) in the span of Q (n, q) become 1/(1+μ) of themselves, others stay."""
    return A - mu / (1 + mu) * (A @ Q) @ Q.t()


def project(subject: Delta, style: Delta, mu: float) -> Delta:
    """ΔW_c·(I − μ/(1+μ)·Q·Qᵀ), Q spanning the rows of ΔW_s; of a low-rank subject only `down` changes.

    The row space of a style without factors (LoHa, LoKr, full) is that of its whole ΔW. Raises MismatchError for DoRA,
    whose difference depends on the weight it is applied to.
    """
    refuse_dora((subject, style))
    Q = _row_basis(style)
    factors = low_rank(subject)
    if factors is None:
        common = (subject.file, subject.key, subject.rank, subject.alpha, subject.scale, subject.shape)
        return ProjectedDelta(*common, subject, Q, mu / (1 + mu))
    up, down = factors
    return FactorDelta.like(subject, up, shrink(down, Q, mu), subject.scale)


def _row_basis(delta: Delta) -> Tensor:
    factors = low_rank(delta)
    if factors is None:
        return orthonormal(delta.matrix().reshape(delta.shape[0], -1))
    up, down = factors
    # Where up is deficient, down spans more than ΔW does; the formula takes down's span, orth(A_sᵀ).
    return orthonormal(down) if bool(up.any()) and delta.scale else down.new_zeros(down.shape[1], 0)
