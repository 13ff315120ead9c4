"""Dynamic Training-Free Fusion (arXiv 2602.15539), its feature-level selection, as an interpretation.

Known of it: at every LoRA layer and step the base output is compared with those that each LoRA alone would give, by KL
divergence, and the LoRA that diverges more is taken, as a hard choice. What the divergence is taken of is not
published; here, of softmax distributions over the output channels of each token (klora.engine.dynamic).
"""

from __future__ import annotations

from klora.fusion.policies.base import BOTH, Moment, Weights
from klora.fusion.policies.k_lora import KLora


class Dynamic(KLora):
    """The subject is active iff D_c ≥ D_s, measured in each layer while sampling; the user's strengths matter."""

    name = "dynamic"
    title = "Dynamic feature-level selection"
    source = "Dynamic Training-Free Fusion, arXiv 2602.15539 (interpretation)"
    balanced = False
    measured = True

    def weights(self, module: str, rho: float, moment: Moment) -> Weights:
        return BOTH
