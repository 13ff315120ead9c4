"""EST-LoRA (Zhang & Xiong, arXiv 2508.02165): Energy, Style discrepancy and Time in K-LoRA's frame.

The energy ‖ΔW‖_F² takes the place of the top-K sum, and a measured number that of β: the authors' program makes one
picture with each LoRA alone (one prompt, one seed), takes d, the cosine of DINO's [CLS] features, and begins its scale
at 1 − d. It also divides the subject's energy by K-LoRA's γ, which the rule as published leaves out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from klora.fusion.policies.base import ScaledPolicy
from klora.fusion.scale import Scale
from klora.settings import Settings

if TYPE_CHECKING:
    from klora.fusion.scores import ModuleScore


class Est(ScaledPolicy):
    """The subject is active iff ‖ΔW_c‖_F² ≥ (α·τ + 1 − d)·‖ΔW_s‖_F², d being the `discrepancy`.

    `gamma_power` p puts K-LoRA's γ to the power of p on the style's side. Norms grow with the square of a file's scale
    and γ with its first power, so only γ² is indifferent to it.
    """

    name = "est"
    title = "EST-LoRA"
    own_settings = frozenset({"gamma_power", "discrepancy"})

    def importance(self, score: ModuleScore, k: int) -> float:
        return score.fro2

    def gamma(self, subject: Sequence[float], style: Sequence[float]) -> float | None:
        gamma = super().gamma(subject, style)
        return None if gamma is None else gamma**self.settings.gamma_power

    def make_scale(self, settings: Settings) -> Scale:
        if settings.alpha is None:
            raise ValueError("settings must be resolved before a policy is made of them")
        return Scale(settings.scale, settings.alpha, 1 - settings.discrepancy)
