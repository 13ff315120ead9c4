"""The share at which a picture shows most of both LoRAs, from their parts in pictures at a few shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from klora.balance.parts import Parts
from klora.errors import KloraError
from klora.fusion.policies import is_heeded
from klora.settings import Settings

SHARES = (0.4, 0.5, 0.6, 0.7, 0.8)
"""The shares of the subject's of which pictures are made: with less there is no subject, with more no style."""
PLACES = (0.25, 0.4, 0.5, 0.6)
"""The places τ of sampling at which the pictures are judged, where both what they show and how it looks is decided."""


@dataclass(frozen=True)
class Candidate:
    """A share of the subject's, and the parts of both LoRAs in a picture at it."""

    share: float
    parts: Parts


def best_of(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with most of both, by the parabola through their harmonic means: one picture alone may be lucky.

    Fewer than three candidates are compared as they are. Raises KloraError where none has a part of both.
    """
    both = np.array([candidate.parts.both for candidate in candidates])
    if not both.any():
        lacking = min(("subject", "style"), key=lambda side: max(getattr(one.parts, side) for one in candidates))
        raise KloraError(
            f"the {lacking}'s LoRA finds nothing of its own in any of the pictures, so that there is no balance to be"
            " found; is the prompt one that it was trained on?"
        )
    if len(candidates) > 2:
        shares = [candidate.share for candidate in candidates]
        both = np.polyval(np.polyfit(shares, both, 2), shares)
    return candidates[int(both.argmax())]


def check_findable(settings: Settings) -> None:
    """Raise KloraError for a policy that has no share to be found, settings that decide it already, and one step."""
    if not is_heeded("share", settings.policy):
        raise KloraError(f"policy: {settings.policy} has no share that could be found; use another, such as k-lora")
    if settings.share is not None or settings.balance:
        raise KloraError("share: is what is to be found; leave out the balance, and any other share")
    if settings.steps == 1:
        raise KloraError(
            "steps: with a single one there is no place at which a picture could be judged; take 2 or more"
        )
