"""NP-LoRA (null-space projection, arXiv 2511.11051): the subject yields where the style's row space is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klora.fusion.policies.base import BOTH, Active, Moment, Policy

if TYPE_CHECKING:
    from klora.lora.deltas import Delta


class NpLora(Policy):
    """ΔW_s + ΔW_c·(I − μ/(1+μ)·Q·Qᵀ) at every step, Q an orthonormal basis of the style's row space."""

    name = "np-lora"
    title = "NP-LoRA"
    static = True
    own_settings = frozenset({"mu"})

    def decide(self, module: str, rho: float, moment: Moment) -> Active:
        return BOTH

    def combine(
        self, module: str, subject: Delta, style: Delta, weights: Active = BOTH
    ) -> tuple[Delta | None, Delta | None]:
        from klora.fusion.policies.np_lora.projection import project

        return project(subject, style, self.settings.mu), style
