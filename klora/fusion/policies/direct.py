"""Direct merge: both LoRAs at every step, the plain sum that K-LoRA is compared with."""

from __future__ import annotations

from fractions import Fraction

from klora.fusion.policies.base import Moment, Weights
from klora.fusion.policies.k_lora import KLora


class Direct(KLora):
    """w_c·ΔW_c + w_s·ΔW_s at every step and in every module; w is the preset times the user's strength.

    With one strength at 0 the other LoRA acts alone, as if it were the only one loaded.
    """

    name = "direct"
    title = "Direct merge"
    source = "plain sum of two LoRAs"
    balanced = False

    @property
    def preset(self) -> Weights:
        """The weights that the preset names."""
        subject, style = (float(Fraction(part)) for part in self.settings.preset.split(","))
        return Weights(subject, style)

    def weights(self, module: str, rho: float, moment: Moment) -> Weights:
        return self.preset

    def outside(self, module: str, allowed: Weights, moment: Moment) -> Weights:
        return allowed.times(self.preset)
