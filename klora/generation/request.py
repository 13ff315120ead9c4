"""What is asked of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from klora.settings import AUTO, Settings

if TYPE_CHECKING:
    from klora.lora.side import SideSource


@dataclass(frozen=True)
class GenerationRequest:
    """Pictures to be made of a pair; None and "auto" leave the choice to the pipeline or the machine."""

    model: str
    subject: SideSource
    style: SideSource
    prompt: str
    out: Path
    settings: Settings
    negative_prompt: str | None = None
    seed: int = 0
    images: int = 1
    size: tuple[int, int] | None = None
    guidance: float | None = None
    device: str = AUTO
    dtype: str = AUTO
    map: bool = False
