"""LoRA Composite (Zhong et al., Multi-LoRA Composition for Image Generation, TMLR 2024, arXiv 2402.16843)."""

from __future__ import annotations

from klora.fusion.policies.base import BOTH, DIFFUSERS, STYLE, SUBJECT, Forward, Moment, Weights
from klora.fusion.policies.k_lora import KLora


class Composite(KLora):
    """ε = mean ε_u,i + s·(mean ε_c,i − mean ε_u,i): each LoRA alone predicts, and the predictions are averaged.

    Guidance is linear in the predictions, so that the mean is taken of what the denoiser gives, before guidance.
    """

    name = "composite"
    title = "LoRA Composite"
    source = "Zhong et al., Multi-LoRA Composition, TMLR 2024, arXiv 2402.16843"
    balanced = False
    hosts = frozenset({DIFFUSERS})
    forwards = 2

    def weights(self, module: str, rho: float, moment: Moment) -> Weights:
        return BOTH

    def predictions(self, moment: Moment) -> tuple[Forward, ...]:
        return (Forward(SUBJECT, 0.5), Forward(STYLE, 0.5))
