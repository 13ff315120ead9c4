"""Fixed selection, an ablation of the K-LoRA paper (section 4.3): all modules switch at the same moment."""

from __future__ import annotations

from types import MappingProxyType

from klora.fusion.policies.base import ScaledPolicy


class Fixed(ScaledPolicy):
    """The subject everywhere while S(τ)·2^b ≤ 1, then the style everywhere.

    The paper's text says the opposite order, against its own finding that subjects form early; the order here
    is the finding's.
    """

    name = "fixed"
    title = "Fixed selection"
    defaults = MappingProxyType({"scale": "s"})  # defined on S (paper, section 4.3), whatever the model

    def compared(self, rho: float) -> float:
        return 1.0
