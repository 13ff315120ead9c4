"""Random selection, an ablation of the K-LoRA paper (section 4.3)."""

from __future__ import annotations

import hashlib

from klora.fusion.policies.base import STYLE, SUBJECT, Active, Moment, Policy

SUBJECT_PROBABILITY = 1 / 3


class Random(Policy):
    """The subject with probability 1/3, else the style, drawn for each module and step.

    A draw depends only on the selection seed, the module's name and floor(τ·N), so a picture can be made again.
    """

    name = "random"
    title = "Random selection"
    own_settings = frozenset({"seed"})

    def decide(self, module: str, rho: float, moment: Moment) -> Active:
        digest = hashlib.sha256(f"{self.settings.seed}:{module}:{moment.step}".encode()).digest()
        draw = int.from_bytes(digest[:8], "big") / 2**64
        return SUBJECT if draw < SUBJECT_PROBABILITY else STYLE
