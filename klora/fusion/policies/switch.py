"""LoRA Switch (Zhong et al., Multi-LoRA Composition for Image Generation, TMLR 2024, arXiv 2402.16843)."""

from __future__ import annotations

from klora.fusion.policies.base import STYLE, SUBJECT, Active, Moment, Policy


class Switch(Policy):
    """One LoRA in all modules, those of one file too, and the other after every `period` steps; the subject begins."""

    name = "switch"
    title = "LoRA Switch"
    own_settings = frozenset({"period"})

    def turn(self, moment: Moment) -> Active:
        """Whose turn it is."""
        return STYLE if moment.step // self.settings.period % 2 else SUBJECT

    def decide(self, module: str, rho: float, moment: Moment) -> Active:
        return self.turn(moment)

    def decide_other(self, module: str, allowed: Active, moment: Moment) -> Active:
        return allowed.times(self.turn(moment))
