"""K-LoRA (Ouyang, Li, Hou, CVPR 2025, arXiv 2502.18461) and its ablations without scale or without γ."""

from __future__ import annotations

from collections.abc import Sequence

from klora.fusion.gamma import given_gamma
from klora.fusion.policies.base import ScaledPolicy
from klora.fusion.scale import Scale
from klora.settings import Settings


class KLora(ScaledPolicy):
    """The subject is active iff S_c ≥ S_s·γ·scale(τ) (paper, Eq. 6-10)."""

    name = "k-lora"
    title = "K-LoRA"


class NoGamma(ScaledPolicy):
    """K-LoRA with γ = 1: what becomes of it when one LoRA's entries are far larger (paper, section 4.3)."""

    name = "no-gamma"
    title = "K-LoRA without γ"

    def gamma(self, subject: Sequence[float], style: Sequence[float]) -> float | None:
        return given_gamma(1.0, subject, style)


class TopKOnly(ScaledPolicy):
    """Eq. 6 alone, S_c ≥ S_s: no scale, no γ, so a module never switches (paper, section 4.3)."""

    name = "top-k"
    title = "Top-K only"
    static = True

    def gamma(self, subject: Sequence[float], style: Sequence[float]) -> float | None:
        return given_gamma(1.0, subject, style)

    def make_scale(self, settings: Settings) -> Scale:
        return Scale("one")
