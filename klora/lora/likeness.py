"""Modules of two files of an unknown model that may be one weight under two names.

Without the model nothing can tell; this only finds what a person should look at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from klora.lora.deltas import Delta
from klora.lora.names import kind_of

_NUMBER = re.compile(r"[0-9]+")
Likeness = tuple[str, str, int]


def alike(subject: Mapping[str, Delta], style: Mapping[str, Delta]) -> list[tuple[str, str]]:
    """Pairs of names, of which each file has one alone, that may be one weight or a fused one and its part.

    They are in the same block by its number, of the same kind and of the same width, and yet named otherwise: under
    another container, or with another height.
    """
    theirs: dict[Likeness, list[str]] = {}
    for name, delta in style.items():
        if name not in subject:
            theirs.setdefault(_likeness(name, delta), []).append(name)
    found = []
    for name, delta in subject.items():
        others = [] if name in style else theirs.get(_likeness(name, delta), [])
        other = next((other for other in others if _named_otherwise(name, delta, other, style[other])), None)
        if other:
            found.append((name, other))
    return found


def _likeness(name: str, delta: Delta) -> Likeness:
    number = _NUMBER.search(name)
    return number[0] if number else "", kind_of(name, delta.shape), delta.columns


def _named_otherwise(name: str, delta: Delta, other: str, theirs: Delta) -> bool:
    high, low = max(delta.shape[0], theirs.shape[0]), min(delta.shape[0], theirs.shape[0])
    if _NUMBER.split(name)[0] != _NUMBER.split(other)[0]:
        return high == low or high == 3 * low
    return high == 3 * low
