"""The search for a balance, in small."""

from __future__ import annotations

import pytest

from klora.generation import balance


def look_at_fewer(patch: pytest.MonkeyPatch) -> tuple[float, ...]:
    """Have it make fewer pictures and judge them at one place; gives their shares."""
    patch.setattr(balance, "SHARES", (0.5, 0.7))
    patch.setattr(balance, "PLACES", (0.4,))
    return (0.5, 0.7)
