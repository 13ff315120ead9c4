"""K-LoRA (CVPR 2025): fuse a subject LoRA and a style LoRA with no training and no tuning.

`plan` says which LoRA would be active where and when; `fuse` makes a diffusers pipeline do it; `release_memory` lets go
of what is kept for the next time; `find_balance` finds how much of each a pair should have. `Settings` has what all can
be told, `FusionPlan` is what the first gives, `Session` what the second does; `ScoreCache` is where scores are kept,
and every error that is meant for a user is a `KloraError`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klora.api import fuse as fuse
    from klora.api import plan as plan
    from klora.api import release_memory as release_memory
    from klora.cache import ScoreCache as ScoreCache
    from klora.engine.session import Session as Session
    from klora.errors import KloraError as KloraError
    from klora.fusion.plan import FusionPlan as FusionPlan
    from klora.generation.balance import find_balance as find_balance
    from klora.settings import Settings as Settings

__version__ = "0.1.0"
__all__ = [
    "FusionPlan",
    "KloraError",
    "ScoreCache",
    "Session",
    "Settings",
    "__version__",
    "find_balance",
    "fuse",
    "plan",
    "release_memory",
]
_MODULES = {
    "FusionPlan": "klora.fusion.plan",
    "KloraError": "klora.errors",
    "ScoreCache": "klora.cache",
    "Session": "klora.engine.session",
    "Settings": "klora.settings",
    "find_balance": "klora.generation.balance",
    "fuse": "klora.api",
    "plan": "klora.api",
    "release_memory": "klora.api",
}


def __getattr__(name: str) -> Any:
    # A WebUI imports this package at start: torch and the rest of klora wait until they are needed.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
