"""How much two LoRAs are in each other's way: angles and shared subspaces of their ΔW, from the factors alone.

With ΔW = B·A everything follows from products of the small sides: BᵀB, A·Aᵀ, and the same across both LoRAs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from klora.fusion.threads import single_threaded_pool
from klora.late import torch
from klora.lora.deltas import Delta
from klora.lora.deltas.computed import low_rank

if TYPE_CHECKING:
    from torch import Tensor

INTERFERENCE_VERSION = 1
EPSILON = 1e-5
"""Singular values below this fraction of the largest are none."""


class Interference(NamedTuple):
    """What two ΔW have in common, as sums that add up over modules.

    `dot` is ⟨ΔW_c, ΔW_s⟩, the energies are ‖ΔW‖_F²; `out_overlap` and `in_overlap` are ‖Q_cᵀQ_s‖_F² / min(rank), the Q
    being orthonormal bases of their column and row spaces; the insides are the energy of each that lies inside the
    other's two spaces. `modules` counts what was added up.
    """

    dot: float
    subject_energy: float
    style_energy: float
    out_overlap: float
    in_overlap: float
    subject_inside: float
    style_inside: float
    modules: int = 1

    @property
    def cosine(self) -> float:
        """The cosine of both ΔW, −1 to 1."""
        size = math.sqrt(self.subject_energy * self.style_energy)
        return max(-1.0, min(1.0, self.dot / size)) if size else 0.0

    @property
    def overlaps(self) -> tuple[float, float]:
        """The mean overlap of output and of input spaces, 0 to 1."""
        return self.out_overlap / self.modules, self.in_overlap / self.modules

    @property
    def inside(self) -> tuple[float, float]:
        """The fractions of the subject's energy inside the style, and of the style's inside the subject, 0 to 1."""
        pairs = ((self.subject_inside, self.subject_energy), (self.style_inside, self.style_energy))
        subject, style = (min(1.0, part / whole) if whole else 0.0 for part, whole in pairs)
        return subject, style


def total(parts: Iterable[Interference]) -> Interference:
    """Several modules as one."""
    return Interference(*(sum(values) for values in zip(*parts, strict=True)))


@dataclass(frozen=True)
class _Small:
    """The sides of one ΔW = s·B·A, fp64, and what makes s·B and Aᵀ orthonormal bases of its column and row space."""

    B: Tensor
    A: Tensor
    scale: float
    energy: float
    to_out: Tensor
    to_in: Tensor

    @classmethod
    def of(cls, up: Tensor, down: Tensor, scale: float) -> _Small:
        B, A = up.double(), down.double()
        G, H = B.t() @ B * scale**2, A @ A.t()
        return cls(B, A, scale, float((G * H).sum()), *(_whole_bases(G, H) or _bases(G, H)))


def _whole_bases(G: Tensor, H: Tensor) -> tuple[Tensor, Tensor] | None:
    """`_bases` by Cholesky, for half the price: L⁻ᵀ of G = L·Lᵀ and of H; None where singular values are to go."""
    found = []
    condition = 1.0
    for M in (G, H):
        L, failed = torch.linalg.cholesky_ex(M)
        if failed:
            return None
        inverse = torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype), upper=False).t()
        # √(‖M‖·‖M⁻¹‖) is at least the condition of this factor, and their product that of ΔW. NaN is no number below.
        condition *= math.sqrt(float(M.norm() * (inverse @ inverse.t()).norm()))
        found.append(inverse)
    return (found[0], found[1]) if condition < 1 / EPSILON else None


def _bases(G: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
    """What makes s·B and Aᵀ orthonormal, of G = s²·BᵀB and H = A·Aᵀ, but for directions of no singular value."""
    root_G, root_H = _root(G), _root(H)
    # B·A has the singular values of √G·√H, and from its vectors those of B·A follow.
    U, S, Vh = torch.linalg.svd(root_G @ root_H)
    there = EPSILON * float(S.max()) < S
    return root_H @ Vh.t()[:, there] / S[there], root_G @ U[:, there] / S[there]


def _root(H: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(H)
    root: Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.t()
    return root


def interferences(modules: Mapping[str, tuple[Delta, Delta]]) -> dict[str, Interference | None]:
    """The interference of every module's subject and style, by name, on all of torch's threads."""
    if not modules:
        return {}
    with single_threaded_pool(len(modules)) as pool:
        return dict(zip(modules, pool.map(interference, *zip(*modules.values(), strict=True)), strict=True))


def interference(subject: Delta, style: Delta) -> Interference | None:
    """What the deltas of one module have in common; None where one has no factors (LoHa, LoKr, DoRA, full)."""
    factors = [(low_rank(delta), delta.scale) for delta in (subject, style)]
    small = [_Small.of(*pair, scale) for pair, scale in factors if pair is not None]
    if len(small) < 2:
        return None
    c, s = small
    X, Y = c.B.t() @ s.B * (c.scale * s.scale), c.A @ s.A.t()
    out, into = c.to_out.t() @ X @ s.to_out, c.to_in.t() @ Y @ s.to_in
    least = max(1, min(c.to_out.shape[1], s.to_out.shape[1]))
    return Interference(
        float((X * Y).sum()),
        c.energy,
        s.energy,
        _square(out) / least,
        _square(into) / least,
        _square(s.to_out.t() @ X.t() @ Y @ s.to_in),
        _square(c.to_out.t() @ X @ Y.t() @ c.to_in),
    )


def _square(M: Tensor) -> float:
    return float(M.square().sum())
