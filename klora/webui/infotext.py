"""Settings in an image's text, and back."""

from __future__ import annotations

from typing import Any

from klora.settings import Settings


def to_infotext(resolved: Settings, given: Settings, share: float | None) -> dict[str, Any]:
    """Write what acted: what is resolved always, the rest where it is not the default."""
    always = ("scale", "alpha", "beta", "scope", "variant")
    entries = {f"K-LoRA {name.replace('_', ' ')}": getattr(resolved, name) for name in always}
    entries.update({f"K-LoRA {name.replace('_', ' ')}": value for name, value in given.changed().items()})
    return entries
