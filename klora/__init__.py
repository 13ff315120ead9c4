"""K-LoRA (CVPR 2025): fuse a subject LoRA and a style LoRA with no training and no tuning.

`plan` says which LoRA would be active where and when; `fuse` makes a diffusers pipeline do it; `release_memory` lets go
of what is kept for the next time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klora.api import fuse as fuse
    from klora.api import plan as plan
    from klora.api import release_memory as release_memory

__version__ = "0.1.0"
__all__ = ["__version__", "fuse", "plan", "release_memory"]


def __getattr__(name: str) -> Any:
    # A WebUI imports this package at start: torch and the rest of klora wait until they are needed.
    if name in ("fuse", "plan", "release_memory"):
        from klora import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
