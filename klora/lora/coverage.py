"""What two sides touch, module by module."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from klora.lora.file import LoraFile
from klora.lora.names import sort_key
from klora.lora.side import Side
from klora.text import one_line


@dataclass(frozen=True)
class Coverage:
    """What two sides touch: canonical names of both, of one only, of text encoders; keys that were not understood."""

    contested: list[str]
    subject_only: list[str]
    style_only: list[str]
    text_encoder: list[str]
    unmatched: list[str]


def coverage(subject: Side, style: Side) -> Coverage:
    """Compare two sides module by module; every list is in network order."""
    ours, theirs = subject.modules, style.modules
    return Coverage(
        contested=[name for name in ours if name in theirs],
        subject_only=[name for name in ours if name not in theirs],
        style_only=[name for name in theirs if name not in ours],
        text_encoder=sorted({*subject.text_encoder, *style.text_encoder}, key=sort_key),
        unmatched=list(dict.fromkeys([*subject.unmatched, *style.unmatched])),
    )


def idle(loras: Iterable[LoraFile]) -> list[str]:
    """Which files have modules of rank 0, one line a file."""
    found = []
    for lora in loras:
        deltas = [delta for delta in (*lora.modules.values(), *lora.text_encoder.values()) if delta.family == "zero"]
        if deltas:
            name, first = one_line(lora.file_name), deltas[0].key
            found.append(f"{name} changes nothing in its modules of rank 0 ({len(deltas)}), such as {first}")
    return found
