"""How much two LoRAs are in each other's way: angles and shared subspaces of their ΔW, from the factors alone.

With ΔW = B·A everything follows from products of the small sides: BᵀB, A·Aᵀ, and the same across both LoRAs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from klora.fusion.scores import OnScored
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


class _Room(threading.local):
    """A thread's memory for four factors in fp64, used for all modules: new memory would cost as much as they."""

    def __init__(self) -> None:
        self._parts = [torch.empty(0, dtype=torch.float64, device="cpu")] * 4

    def double(self, part: int, M: Tensor) -> Tensor:
        """`M` in fp64."""
        if self._parts[part].numel() < M.numel():
            self._parts[part] = torch.empty(M.numel(), dtype=torch.float64, device="cpu")
        return self._parts[part][: M.numel()].view(M.shape).copy_(M)


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
    def of(cls, B: Tensor, A: Tensor, scale: float) -> _Small:
        G, H = B.t() @ B * scale**2, A @ A.t()
        return cls(B, A, scale, _dot(G, H), *(_whole_bases(G, H) or _bases(G, H)))


def _whole_bases(G: Tensor, H: Tensor) -> tuple[Tensor, Tensor] | None:
    """`_bases` by Cholesky, for half the price: L⁻ᵀ of G = L·Lᵀ and of H; None where singular values are to go."""
    found = []
    condition = 1.0
    for M in (G, H):
        L, failed = torch.linalg.cholesky_ex(M)
        if failed:
            return None
        one = torch.eye(len(L), dtype=L.dtype, device=L.device)
        inverse = torch.linalg.solve_triangular(L, one, upper=False).t()
        # √(‖M‖·‖M⁻¹‖) is at least the condition of this factor, and their product that of ΔW; ‖L⁻¹‖² is at least
        # ‖M⁻¹‖. NaN is no number below.
        condition *= math.sqrt(math.sqrt(_square(M)) * _square(inverse))
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


def interferences(
    modules: Mapping[str, tuple[Delta, Delta]], on_compared: OnScored | None = None
) -> dict[str, Interference | None]:
    """The interference of every module's subject and style, by name, on all of torch's threads.

    `on_compared` is called with how many modules are done, and of how many.
    """
    found: dict[str, Interference | None] = {}
    if not modules:
        return found
    compare = partial(interference, room=_Room())
    with single_threaded_pool(len(modules)) as pool:
        for name, one in zip(modules, pool.map(compare, *zip(*modules.values(), strict=True)), strict=True):
            found[name] = one
            if on_compared:
                on_compared(len(found), len(modules))
    return found


def interference(subject: Delta, style: Delta, room: _Room | None = None) -> Interference | None:
    """What the deltas of one module have in common; None where one has no factors (LoHa, LoKr, DoRA, full)."""
    subject_factors, style_factors = low_rank(subject), low_rank(style)
    if subject_factors is None or style_factors is None:
        return None
    with torch.inference_mode():
        room = room or _Room()
        c = _Small.of(room.double(0, subject_factors[0]), room.double(1, subject_factors[1]), subject.scale)
        s = _Small.of(room.double(2, style_factors[0]), room.double(3, style_factors[1]), style.scale)
        return _compare(c, s)


def _compare(c: _Small, s: _Small) -> Interference:
    X, Y = c.B.t() @ s.B * (c.scale * s.scale), c.A @ s.A.t()
    X_c, X_s, Y_c, Y_s = c.to_out.t() @ X, X @ s.to_out, c.to_in.t() @ Y, Y @ s.to_in
    least = max(1, min(c.to_out.shape[1], s.to_out.shape[1]))
    return Interference(
        _dot(X, Y),
        c.energy,
        s.energy,
        _square(X_c @ s.to_out) / least,
        _square(Y_c @ s.to_in) / least,
        _square(X_s.t() @ Y_s),
        _square(X_c @ Y_c.t()),
    )


def _dot(M: Tensor, N: Tensor) -> float:
    return float(torch.dot(M.reshape(-1), N.reshape(-1)))


def _square(M: Tensor) -> float:
    return _dot(M, M)
