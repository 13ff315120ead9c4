"""One module's tensors → a Delta. A family is one file: a class with `load`, tried in the order of FAMILIES."""

from __future__ import annotations

import math
from dataclasses import replace

from klora.errors import LoraFileError
from klora.lora.deltas.base import Bias, Delta, Factors, FamilyDelta, FileDelta, Group, size
from klora.lora.deltas.dora import DoraDelta
from klora.lora.deltas.full import FullDelta
from klora.lora.deltas.loha import LohaDelta
from klora.lora.deltas.lokr import LokrDelta
from klora.lora.deltas.lora import LoraDelta
from klora.lora.deltas.wide import WideDelta
from klora.lora.deltas.zero import ZeroDelta
from klora.lora.source import Stored

__all__ = [
    "FAMILIES",
    "Bias",
    "Delta",
    "DoraDelta",
    "Factors",
    "FamilyDelta",
    "FileDelta",
    "FullDelta",
    "Group",
    "LohaDelta",
    "LokrDelta",
    "LoraDelta",
    "Stored",
    "WideDelta",
    "ZeroDelta",
    "load_delta",
]

# DoRA before its directions, which look like any other family.
FAMILIES: tuple[type[FamilyDelta], ...] = (ZeroDelta, DoraDelta, LoraDelta, LohaDelta, LokrDelta, FullDelta)


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
    if delta and group.reshape == delta.shape:
        # ComfyUI widens the layer to this shape, which the delta has.
        group.used.add("reshape")
    return delta and replace(delta, bias=_bias(group, delta))


def _bias(group: Group, delta: Delta) -> Bias | None:
    """What the group adds to the bias: that of PEFT's second factor is scaled as ΔW is, LyCORIS' is not."""
    if "down_bias" in group:
        raise group.error(group.tensors["down_bias"], "is a bias between the two factors, which no program applies")
    terms = []
    for slot, factor in (("up_bias", delta.scale), ("diff_b", 1.0)):
        if stored := group.get(slot):
            if math.prod(stored.shape) != delta.shape[0]:
                raise group.error(stored, f"is {size(stored.shape)}, for a module of {delta.shape[0]} outputs")
            terms.append((stored.view(delta.shape[0]), factor))
    return Bias(tuple(terms)) if terms else None
