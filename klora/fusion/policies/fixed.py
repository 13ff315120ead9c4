"""Fixed selection, an ablation of the K-LoRA paper (section 4.3): all modules switch at the same moment."""

from __future__ import annotations

from klora.fusion.policies.k_lora import KLora


class Fixed(KLora):
    """The subject everywhere while S(τ)·2^b ≤ 1, then the style everywhere.

    The paper's text says the opposite order, against its own finding that subjects form early; the order here
    is the finding's.
    """

    name = "fixed"
    title = "Fixed selection"

    def standing(self, rho: float) -> float:
        return 1.0
