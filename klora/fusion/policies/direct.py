"""Direct merge: both LoRAs at every step, the plain sum that K-LoRA is compared with."""

from __future__ import annotations

from fractions import Fraction

from klora.fusion.policies.base import Active, Moment, Policy


class Direct(Policy):
    """w_c·ΔW_c + w_s·ΔW_s at every step and in every module; w is the preset times the user's strength.

    With one strength at 0 the other LoRA acts alone, as if it were the only one loaded.
    """

    name = "direct"
    title = "Direct merge"
    static = True
    own_settings = frozenset({"preset"})

    @property
    def preset(self) -> Active:
        """The weights that the preset names."""
        subject, style = (float(Fraction(part)) for part in self.settings.preset.split(","))
        return Active(subject, style)

    def decide(self, module: str, rho: float, moment: Moment) -> Active:
        return self.preset

    def decide_other(self, module: str, allowed: Active, moment: Moment) -> Active:
        return allowed.times(self.preset)
