"""The files of a fusion's sides, by the names that people write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from klora.hosts.webui.lora_library import Library, ListedLora
from klora.pair import PAIRS, Pair
from klora.webui.options import score_cache
from klora.webui.side_text import parts_of


class SideLora(NamedTuple):
    """A LoRA of a side: its name as it was written, the file, and its weight."""

    name: str
    lora: ListedLora
    weight: float


def find_side(text: str, side: str, names: Library) -> tuple[SideLora, ...]:
    """The LoRAs that a text means; KloraError for a name that is none's, SettingsError for a bad weight."""
    parts = parts_of(text, side, names.knows)
    return tuple(SideLora(name, names.find(name), weight) for name, weight in parts)


def open_pair(subject: Sequence[SideLora], style: Sequence[SideLora]) -> Pair:
    """Open the files of both sides, or give them as they were opened before."""
    ours, theirs = ([(one.lora.path, one.weight) for one in side] for side in (subject, style))
    return PAIRS.open(ours, theirs, score_cache())
