"""Random selection, an ablation of the K-LoRA paper (section 4.3)."""

from __future__ import annotations

import hashlib

from klora.fusion.policies.base import STYLE, SUBJECT, Moment, Weights
from klora.fusion.policies.k_lora import KLora

SUBJECT_PROBABILITY = 1 / 3


class Random(KLora):
    """The subject with probability 1/3, else the style, drawn for each module and step.

    A draw depends only on the selection seed, the module's name and floor(τ·N), so a picture can be made again.
    """

    name = "random"
    title = "Random selection"
    balanced = False

    def weights(self, module: str, rho: float, moment: Moment) -> Weights:
        digest = hashlib.sha256(f"{self.settings.seed}:{module}:{moment.step}".encode()).digest()
        draw = int.from_bytes(digest[:8], "big") / 2**64
        return SUBJECT if draw < SUBJECT_PROBABILITY else STYLE
