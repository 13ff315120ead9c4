"""One module's tensors → a Delta. A family is one file: a class with `load`, tried in the order of FAMILIES."""

from __future__ import annotations

from klora.lora.deltas.base import Delta, Factors, Group, Stored
from klora.lora.deltas.dora import DoraDelta
from klora.lora.deltas.full import FullDelta
from klora.lora.deltas.loha import LohaDelta
from klora.lora.deltas.lokr import LokrDelta
from klora.lora.deltas.lora import LoraDelta

__all__ = [
    "FAMILIES",
    "Delta",
    "DoraDelta",
    "Factors",
    "FullDelta",
    "Group",
    "LohaDelta",
    "LokrDelta",
    "LoraDelta",
    "Stored",
    "load_delta",
]

# DoRA first: its direction looks like any other family.
FAMILIES: tuple[type[Delta], ...] = (DoraDelta, LoraDelta, LohaDelta, LokrDelta, FullDelta)


def load_delta(group: Group) -> Delta | None:
    """The delta that a group of tensors makes, or None when no family knows it.

    Raises LoraFileError where a tensor is missing, empty or of a shape that does not multiply.
    """
    return next((delta for family in FAMILIES if (delta := family.load(group)) is not None), None)
