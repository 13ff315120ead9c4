"""A side of a fusion as text, `dog*0.8 + coat*0.5`: names of LoRAs, each with its weight if that is not 1.

A text that is a name as it stands means that one. In any other, a name that holds signs of this notation or of
the tag's is written as in URLs: %2B for a plus, %2A for an asterisk, %3A for a colon.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from urllib.parse import unquote

from klora.errors import KloraError
from klora.hosts.webui.lora_library import Library, ListedLora
from klora.lora.weighted import check_weight, weighted_name
from klora.pair import PAIRS, Pair
from klora.webui.options import score_cache

_SIGNS = re.compile("[%+*:<>=()\\[\\]|,]")


class SideLora(NamedTuple):
    """A LoRA of a side: its name as it was written, the file, and its weight."""

    name: str
    lora: ListedLora
    weight: float


def find_side(text: str, side: str, names: Library) -> tuple[SideLora, ...]:
    """The LoRAs that a text means; KloraError for a name that is none's, SettingsError for a bad weight."""
    parts = split_side(text, side)
    if parts != [(text, 1.0)] and names.knows(text):
        parts = [(text, 1.0)]
    return tuple(SideLora(name, names.find(name), weight) for name, weight in parts)


def open_pair(subject: Sequence[SideLora], style: Sequence[SideLora]) -> Pair:
    """Open the files of both sides, or give them as they were opened before."""
    ours, theirs = ([(one.lora.path, one.weight) for one in side] for side in (subject, style))
    return PAIRS.open(ours, theirs, score_cache())


def split_side(text: str, side: str) -> list[tuple[str, float]]:
    """The names of a text and their weights; KloraError where one is missing, SettingsError for a bad weight."""
    return [_part(part.strip(), text, side) for part in text.split("+")]


def join_side(parts: Iterable[tuple[str, float]]) -> str:
    """Write names with their weights."""
    return " + ".join(weighted_name(quoted(name), weight) for name, weight in parts)


def quoted(name: str) -> str:
    """A name with the signs of the notation as in URLs."""
    return _SIGNS.sub(lambda sign: f"%{ord(sign[0]):02X}", name)


def _part(part: str, text: str, side: str) -> tuple[str, float]:
    name, star, weight = part.rpartition("*")
    if not star:
        name, weight = part, "1"
    name = unquote(name.strip())
    if not name:
        raise KloraError(f"{text!r} names no LoRA before or after a sign; write a + or * of a name as %2B or %2A")
    return name, check_weight(weight.strip(), side)
