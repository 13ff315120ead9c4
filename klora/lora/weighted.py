"""The weight of a LoRA among others of its side: what it may be, and how it is written."""

from __future__ import annotations

import math
from numbers import Real
from pathlib import Path

from klora.errors import SettingsError
from klora.text import printable

MAX_WEIGHT = 10.0


def weighted_name(name: str, weight: float) -> str:
    """A name with its weight where that is not 1: dog*0.8."""
    return name if weight == 1 else f"{name}*{repr(float(weight)).removesuffix('.0')}"


def check_weight(value: object, side: str) -> float:
    """A weight of a LoRA in a side; SettingsError, naming the `side`, for what cannot be one."""
    number = math.nan
    if isinstance(value, (Real, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    if not abs(number) <= MAX_WEIGHT:
        raise SettingsError(
            side,
            f"{printable(repr(value))} is not a weight: it must be a number from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}",
        )
    return number


def split_weight(text: str, side: str, folder: Path | None = None) -> tuple[str, float]:
    """Read FILE or FILE:WEIGHT; SettingsError, naming the `side`, for a weight that cannot be one.

    A file whose name ends like a weight is meant where it is there, in the `folder` if one is given.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or not _is_number(weight) or Path(folder or "", text).exists():
        return text, 1.0
    return path, check_weight(weight, side)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
