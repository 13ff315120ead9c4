"""LoRA Switch (Zhong et al., Multi-LoRA Composition for Image Generation, TMLR 2024, arXiv 2402.16843)."""

from __future__ import annotations

from klora.fusion.policies.base import STYLE, SUBJECT, Moment, Weights
from klora.fusion.policies.k_lora import KLora


class Switch(KLora):
    """One LoRA in all modules, those of one file too, and the other after every `period` steps; the subject begins."""

    name = "switch"
    title = "LoRA Switch"
    source = "Zhong et al., Multi-LoRA Composition, TMLR 2024, arXiv 2402.16843"
    balanced = False

    def turn(self, moment: Moment) -> Weights:
        """Say whose turn it is."""
        return STYLE if moment.step // self.settings.period % 2 else SUBJECT

    def weights(self, module: str, rho: float, moment: Moment) -> Weights:
        return self.turn(moment)

    def outside(self, module: str, allowed: Weights, moment: Moment) -> Weights:
        return allowed.times(self.turn(moment))
