"""γ, the number that makes the two LoRAs of a fusion comparable (K-LoRA, Eq. 9), and what else stands in its place.

Each takes Σ|ΔW_c| and Σ|ΔW_s| of every contested module l, in one order, and is None where it is not defined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def global_gamma(subject: Sequence[float], style: Sequence[float]) -> float | None:
    """γ = Σ_l Σ|ΔW_c| / Σ_l Σ|ΔW_s| (K-LoRA, Eq. 9); None where one side is zero."""
    total_c, total_s = math.fsum(subject), math.fsum(style)
    return total_c / total_s if total_c and total_s else None


def trimmed_gamma(subject: Sequence[float], style: Sequence[float]) -> float | None:
    """γ as in the authors' code: the mean of the modules' L1 ratios without those of 3 × their mean or more.

    None where these are none, or all zero.
    """
    ratios = [l1_c / l1_s for l1_c, l1_s in zip(subject, style, strict=True) if l1_s]
    if not ratios:
        return None
    mean = math.fsum(ratios) / len(ratios)
    kept = [ratio for ratio in ratios if ratio < 3 * mean]
    return math.fsum(kept) / len(kept) if any(kept) else None


def given_gamma(gamma: float, subject: Sequence[float], style: Sequence[float]) -> float | None:
    """A `gamma` that is given; None where one side is zero everywhere, as with any other."""
    return None if global_gamma(subject, style) is None else gamma
