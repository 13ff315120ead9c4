"""NP-LoRA (null-space projection, arXiv 2511.11051): the subject yields where the style's row space is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klora.fusion.policies.base import BOTH, Moment, Weights
from klora.fusion.policies.k_lora import KLora

if TYPE_CHECKING:
    from klora.lora.deltas import Delta


class NpLora(KLora):
    """ΔW_s + ΔW_c·(I − μ/(1+μ)·Q·Qᵀ) at every step, Q an orthonormal basis of the style's row space."""

    name = "np-lora"
    title = "NP-LoRA"
    source = "NP-LoRA, arXiv 2511.11051"
    balanced = False

    def weights(self, module: str, rho: float, moment: Moment) -> Weights:
        return BOTH

    def combine(self, subject: Delta, style: Delta) -> tuple[Delta | None, Delta | None]:
        from klora.fusion.projection import project

        return project(subject, style, self.settings.mu), style
