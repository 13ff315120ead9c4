"""Differences of parameters that are no weight of a linear layer or a convolution: norms, biases, modulations, tables.

They take no part in the selection. Which parameter a key means is known once there is a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from klora.errors import LoraValueError
from klora.lora.deltas import FullDelta
from klora.lora.deltas.base import all_finite
from klora.lora.source import Stored

if TYPE_CHECKING:
    from torch import Tensor

# What each slot means beside a prefix: the parameter's own name behind it, or none where the prefix may name it.
_LEAVES = {
    "diff": ("weight", ""),
    "set": ("weight", ""),
    "diff_b": ("bias",),
    "diff_m": ("modulation",),
    "w_norm": ("weight",),
    "b_norm": ("bias",),
}
# Whole parameters, which stand in the place of the model's: BFL's control LoRAs, diffusers' of the same, PEFT's.
_WHOLE = re.compile(
    r"(?:.*[._])?(?:query|key)_norm\.scale|.*\.norm_(?:added_)?[qk]\.weight|.*\.modules_to_save(?:\.\w+)?\.(?:weight|bias)"
)
_SAVED = re.compile(r"\.modules_to_save(?:\.\w+)?(?=\.(?:weight|bias)$)")


@dataclass(frozen=True, eq=False)
class ParameterDelta:
    """What a file makes of one parameter: a difference, or with `whole` the parameter itself.

    `paths` are the file's own names of it, of which the model has one; `key` is the full key of the tensor.
    """

    file: str
    key: str
    paths: tuple[str, ...]
    value: Stored
    whole: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored."""
        return self.value.shape

    def change(self, base: Tensor) -> Tensor:
        """The difference from `base`, fp32 on its device and in its shape."""
        value = self.value.fp32().to(base.device).view(base.shape)
        return value - base.detach().float() if self.whole else value

    def check_finite(self) -> None:
        """Raise LoraValueError, naming file and key, where it holds NaN or infinity."""
        if not all_finite(self.value.data()):
            cure = "the training diverged: use another file or epoch"
            raise LoraValueError(self.file, "holds NaN or infinity", cure, self.key)


def of_slots(file: str, prefix: str, keys: Mapping[str, str], left: Mapping[str, Stored]) -> list[ParameterDelta]:
    """The parameters among the tensors of a module, by slot, that its delta left."""
    return [
        ParameterDelta(
            file,
            keys[slot],
            tuple(f"{prefix}.{leaf}".removesuffix(".") for leaf in leaves),
            left[slot],
            whole=slot == "set",
        )
        for slot, leaves in _LEAVES.items()
        if slot in left
    ]


def of_key(file: str, key: str, value: Stored) -> ParameterDelta:
    """A whole parameter under its own name."""
    return ParameterDelta(file, key, (_SAVED.sub("", key),), value, whole=True)


def is_whole(key: str) -> bool:
    """Whether a key that is of no LoRA's tensor names a whole parameter."""
    return _WHOLE.fullmatch(key) is not None


def of_full(delta: FullDelta, prefix: str, keys: Mapping[str, str]) -> list[ParameterDelta]:
    """A full difference of what is no linear layer or convolution, and that of its bias; `keys` go by slot."""
    beside = delta.bias.stored() if delta.bias else ()
    return [
        ParameterDelta(delta.file, keys["diff"], (f"{prefix}.weight", prefix), delta.diff),
        *(ParameterDelta(delta.file, keys["diff_b"], (f"{prefix}.bias",), bias) for bias in beside),
    ]
