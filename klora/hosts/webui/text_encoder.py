"""The text-encoder part of a LoRA, as a WebUI's own LoRA code takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from klora.hosts.webui.lora_library import ListedLora
from klora.lora.deltas import Delta


@dataclass(frozen=True)
class TextPart:
    """The text-encoder part of one file: `deltas` by canonical name, applied with `strength`."""

    lora: ListedLora
    deltas: Mapping[str, Delta]
    strength: float
    sha256: str
