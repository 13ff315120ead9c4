"""Direct merge: both LoRAs at every step, the plain sum that K-LoRA is compared with."""

from __future__ import annotations

from klora.fusion.policies.base import BOTH, Moment, Weights
from klora.fusion.policies.k_lora import KLora


class Direct(KLora):
    """w_c·ΔW_c + w_s·ΔW_s at every step; the user's strengths are w_c and w_s.

    With one strength at 0 the other LoRA acts alone, as if it were the only one loaded.
    """

    name = "direct"
    title = "Direct merge"
    source = "plain sum of two LoRAs"
    balanced = False

    def weights(self, module: str, rho: float, moment: Moment) -> Weights:
        return BOTH
