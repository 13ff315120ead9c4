"""One module's tensors → a Delta. A family is one file: a class with `load`, tried in the order of FAMILIES."""

from __future__ import annotations

import math

from klora.errors import LoraFileError
from klora.lora.deltas.base import Delta, Factors, FileDelta, Group, size
from klora.lora.deltas.dora import DoraDelta
from klora.lora.deltas.full import FullDelta
from klora.lora.deltas.loha import LohaDelta
from klora.lora.deltas.lokr import LokrDelta
from klora.lora.deltas.lora import LoraDelta
from klora.lora.source import Stored

__all__ = [
    "FAMILIES",
    "Delta",
    "DoraDelta",
    "Factors",
    "FileDelta",
    "FullDelta",
    "Group",
    "LohaDelta",
    "LokrDelta",
    "LoraDelta",
    "Stored",
    "load_delta",
]

# DoRA first: its direction looks like any other family.
FAMILIES: tuple[type[FileDelta], ...] = (DoraDelta, LoraDelta, LohaDelta, LokrDelta, FullDelta)


# Larger than any layer of a known model; small factors can have a product that fills the memory.
MAX_SIDE, MAX_ENTRIES = 2**16, 2**27


def load_delta(group: Group) -> FileDelta | None:
    """The delta that a group of tensors makes, or None when no family knows it.

    Raises LoraFileError where a tensor is missing, empty or of a shape that does not multiply, or the product is larger
    than a layer can be.
    """
    delta = next((delta for family in FAMILIES if (delta := family.load(group)) is not None), None)
    if delta and (max(delta.shape[0], delta.columns) > MAX_SIDE or math.prod(delta.shape) > MAX_ENTRIES):
        reason = f"makes a weight of {size(delta.shape)}, larger than any layer"
        raise LoraFileError(group.file, reason, "the file is damaged: download or export it again", group.key)
    return delta
