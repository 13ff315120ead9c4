"""Dynamic Training-Free Fusion (arXiv 2602.15539), its feature-level selection, as an interpretation.

Known of it: at every LoRA layer and step the base output is compared with those that each LoRA alone would give, by KL
divergence, and the LoRA that diverges more is taken, as a hard choice. What the divergence is taken of is not
published; here, of softmax distributions over the output channels of each token (klora.engine.dynamic).
"""

from __future__ import annotations

from klora.fusion.policies.base import BOTH, Active, Moment, Policy


class Dynamic(Policy):
    """The subject is active iff D_c ≥ D_s, measured in each layer while sampling; the user's strengths matter."""

    name = "dynamic"
    title = "Dynamic feature-level selection"
    measured = True
    takes_references = True
    own_settings = frozenset(
        {"distance", "tokens", "reuse", "style_refs", "subject_refs", "clip_model", "dino_model"}
        | {"style_pull", "subject_pull", "refine_step", "refine_from", "refine_to"}
    )

    def decide(self, module: str, rho: float, moment: Moment) -> Active:
        return BOTH
