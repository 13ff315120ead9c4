"""LoRA Composite (Zhong et al., Multi-LoRA Composition for Image Generation, TMLR 2024, arXiv 2402.16843)."""

from __future__ import annotations

from klora.fusion.policies.base import BOTH, STYLE, SUBJECT, Active, Forward, Moment, Policy


class Composite(Policy):
    """ε = mean ε_u,i + s·(mean ε_c,i − mean ε_u,i): each LoRA alone predicts, and the predictions are averaged.

    Guidance is linear in the predictions, so that the mean is taken of what the denoiser gives, before guidance.
    """

    name = "composite"
    title = "LoRA Composite"
    forwards = 2

    def decide(self, module: str, rho: float, moment: Moment) -> Active:
        return BOTH

    def predictions(self, moment: Moment) -> tuple[Forward, ...]:
        return (Forward(SUBJECT, 0.5), Forward(STYLE, 0.5))
