"""K-LoRA (Ouyang, Li, Hou, CVPR 2025, arXiv 2502.18461) and its ablations without scale or without γ."""

from __future__ import annotations

from collections.abc import Sequence

from klora.fusion.policies.base import ScaledPolicy, SharedModule, global_gamma
from klora.fusion.scale import Scale
from klora.settings import Settings


def unit_gamma(modules: Sequence[SharedModule]) -> float | None:
    """γ = 1; None where one side is zero everywhere, as with any other γ."""
    return None if global_gamma(modules) is None else 1.0


class KLora(ScaledPolicy):
    """The subject is active iff S_c ≥ S_s·γ·scale(τ) (paper, Eq. 6-10)."""

    name = "k-lora"
    title = "K-LoRA"


class NoGamma(ScaledPolicy):
    """K-LoRA with γ = 1: what becomes of it when one LoRA's entries are far larger (paper, section 4.3)."""

    name = "no-gamma"
    title = "K-LoRA without γ"

    def gamma(self, modules: Sequence[SharedModule]) -> float | None:
        return unit_gamma(modules)


class TopKOnly(ScaledPolicy):
    """Eq. 6 alone, S_c ≥ S_s: no scale, no γ, so a module never switches (paper, section 4.3)."""

    name = "top-k"
    title = "Top-K only"
    static = True

    def gamma(self, modules: Sequence[SharedModule]) -> float | None:
        return unit_gamma(modules)

    def make_scale(self, settings: Settings) -> Scale:
        return Scale("one")
