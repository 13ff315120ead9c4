"""EST-LoRA (arXiv 2508.02165): K-LoRA's frame with the energy ‖ΔW‖_F² in place of the top-K sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from klora.fusion.policies.base import ScaledPolicy, SharedModule

if TYPE_CHECKING:
    from klora.fusion.scores import ModuleScore


class Est(ScaledPolicy):
    """The subject is active iff ‖ΔW_c‖_F² ≥ ‖ΔW_s‖_F²·γ·scale(τ), or, with `gamma_power` 2, γ².

    Norms grow with the square of a file's scale and γ with its first power, so only γ² is indifferent to it.
    """

    name = "est"
    title = "EST-LoRA"
    own_settings = frozenset({"gamma_power"})

    def importance(self, score: ModuleScore, k: int) -> float:
        return score.fro2

    def gamma(self, modules: Sequence[SharedModule]) -> float | None:
        gamma = super().gamma(modules)
        return None if gamma is None else gamma**self.settings.gamma_power
