"""The scales S and S* of the paper, the one comparison that decides, and where its outcome switches.

τ is the position in the sampling schedule, 0 at its start and 1 at its end.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from dataclasses import dataclass


def scale_s(tau: float, alpha: float = 1.5, beta: float = 0.5) -> float:
    """S(τ) = α·τ + β (paper, Eq. 7)."""
    return alpha * tau + beta


def scale_s_star(tau: float, alpha: float = 1.5, beta: float = 1.3) -> float:
    """S*(τ) = (α·τ + β) mod α (paper, Eq. 12; its α' and its modulus are the same number)."""
    return (alpha * tau + beta) % alpha


@dataclass(frozen=True)
class Scale:
    """A scale with its parameters: `kind` "s", "s*" or "one" (no scale: 1 at every τ)."""

    kind: str
    alpha: float = 1.5
    beta: float = 0.5

    def __call__(self, tau: float) -> float:
        """The scale at position τ."""
        if self.kind == "one":
            return 1.0
        return (scale_s_star if self.kind == "s*" else scale_s)(tau, self.alpha, self.beta)


def subject_wins(rho: float, scale: float, balance: float = 0.0, strict: bool = False) -> bool:
    """Compare S_c with S_s·γ·scale (paper, Eq. 6, 8, 10), both divided by S_s·γ: ρ ≥ scale·2^b.

    Every decision of K-LoRA, in planning and in sampling, is made here. `strict` asks for > instead of ≥, as
    the authors' code does.
    """
    threshold: float = scale * 2.0**balance
    return rho > threshold if strict else rho >= threshold


def switch_steps(wins: Callable[[float], bool], scale: Scale, steps: int) -> tuple[int, ...]:
    """The steps i, 0 < i < steps, at which `wins` differs from the step before, ascending; step i is at τ = i/N.

    Between two drops of the scale the outcome can only go from subject to style, so each such piece is searched
    by bisection on `wins` itself; a second formula could disagree with it in the last bit.
    """
    taus = [i / steps for i in range(steps)]
    scales = [scale(tau) for tau in taus]
    starts = [0, *(i for i in range(1, steps) if scales[i] < scales[i - 1]), steps]
    found = []
    for start, stop in itertools.pairwise(starts):
        if start and wins(taus[start]) != wins(taus[start - 1]):
            found.append(start)
        first_style = bisect.bisect_left(range(stop), True, lo=start, key=lambda i: not wins(taus[i]))
        if start < first_style < stop:
            found.append(first_style)
    return tuple(found)
