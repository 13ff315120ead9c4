"""K-LoRA (Ouyang, Li, Hou, CVPR 2025, arXiv 2502.18461) and its ablations without scale or without γ."""

from __future__ import annotations

import math
from collections.abc import Sequence

from klora.fusion.policies.base import Contest, Policy
from klora.fusion.schedule import Schedule
from klora.settings import Settings


def global_gamma(contests: Sequence[Contest]) -> float | None:
    """γ = Σ_l Σ|ΔW_c| / Σ_l Σ|ΔW_s| over the contested modules (paper, Eq. 9)."""
    subject = math.fsum(contest.subject.l1 for contest in contests)
    style = math.fsum(contest.style.l1 for contest in contests)
    return subject / style if subject and style else None


def trimmed_gamma(contests: Sequence[Contest]) -> float | None:
    """Give γ as the authors' code does: the mean of the modules' L1 ratios without those of 3 × their mean or more."""
    ratios = [contest.subject.l1 / contest.style.l1 for contest in contests if contest.style.l1]
    if not ratios or not any(ratios):
        return None
    mean = math.fsum(ratios) / len(ratios)
    kept = [ratio for ratio in ratios if ratio < 3 * mean]
    return math.fsum(kept) / len(kept) if kept else None


class KLora(Policy):
    """The subject is active iff S_c ≥ S_s·γ·scale(τ) (paper, Eq. 6–10)."""

    name = "k-lora"
    title = "K-LoRA"
    source = "Ouyang et al., K-LoRA, CVPR 2025"

    def gamma(self, contests: Sequence[Contest]) -> float | None:
        return (trimmed_gamma if self.settings.variant == "official" else global_gamma)(contests)


class NoGamma(KLora):
    """K-LoRA with γ = 1: what becomes of it when one LoRA's entries are far larger (paper, section 4.3)."""

    name = "no-gamma"
    title = "K-LoRA without γ"

    def gamma(self, contests: Sequence[Contest]) -> float | None:
        return None if global_gamma(contests) is None else 1.0


class TopKOnly(NoGamma):
    """Eq. 6 alone, S_c ≥ S_s: no scale, no γ, so a module never switches (paper, section 4.3)."""

    name = "top-k"
    title = "Top-K only"

    def make_schedule(self, settings: Settings) -> Schedule:
        return Schedule("one")
