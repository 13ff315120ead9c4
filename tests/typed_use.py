"""How a program uses the library, as a type checker sees it: mypy fails where an error that is expected is not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

import klora


def uses(pipe: Any, subject: dict[str, Tensor], style: Path) -> tuple[klora.FusionPlan, float | None]:
    """Good and bad keywords, of all kinds of sources."""
    with klora.fuse(pipe, subject, style, balance=0.5, share=None, policy="k-lora") as session:
        seen: klora.Session = session
    with klora.fuse(pipe, "a.safetensors", style, balanse=0.5):  # type: ignore[call-arg]
        pass
    klora.plan("a.safetensors", style, steps="thirty")  # type: ignore[arg-type]
    klora.plan(subject, 7)  # type: ignore[arg-type]
    plan: klora.FusionPlan = klora.plan("a.safetensors", style, cache=klora.ScoreCache(), steps=28)
    return plan, seen.tau
