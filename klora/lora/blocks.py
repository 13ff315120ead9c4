"""Multipliers of a LoRA by block: by the names that maps show, by paths, and in the vectors of LoRA Block Weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from klora.errors import SettingsError
from klora.lora.names import block_label, block_of, ldm_names
from klora.lora.text_names import t5_path
from klora.lora.weighted import check_weight
from klora.settings import Settings

TEXT, T5 = "base", "t5"
"""What the vectors call the text encoder, and the second one of FLUX."""


class Vector(NamedTuple):
    """The models that a vector is for, and their blocks in its order."""

    models: tuple[str, ...]
    blocks: tuple[str, ...]


def _vector(models: str, *blocks: str | tuple[str, Iterable[int]]) -> Vector:
    names: list[str] = []
    for block in blocks:
        names += [block] if isinstance(block, str) else [f"{block[0]}{number:02}" for number in block[1]]
    return Vector(tuple(models.split()), tuple(names))


_ATTENTION = (1, 2, 4, 5, 7, 8)
VECTORS = {
    12: _vector("SDXL", TEXT, ("in", _ATTENTION[2:]), "m00", ("out", range(6))),
    17: _vector("SD1 SD2", TEXT, ("in", _ATTENTION), "m00", ("out", range(3, 12))),
    20: _vector("SDXL", TEXT, ("in", range(9)), "m00", ("out", range(9))),
    26: _vector("SD1 SD2", TEXT, ("in", range(12)), "m00", ("out", range(12))),
    61: _vector("FLUX", TEXT, T5, "in", ("d", range(19)), ("s", range(38)), "out"),
}
"""By the number of values. What of its models' blocks a vector leaves out is at 0."""

PRESETS = {
    "NONE": "0" * 17,
    "ALL": "1" * 17,
    "INS": "1111" + "0" * 13,
    "IND": "1000111" + "0" * 10,
    "INALL": "1111111" + "0" * 10,
    "MIDD": "1000" + "1" * 8 + "0" * 5,
    "OUTD": "1" + "0" * 7 + "1111" + "0" * 5,
    "OUTS": "1" + "0" * 11 + "11111",
    "OUTALL": "1" + "0" * 7 + "1" * 9,
    "ALL0.5": ["0.5"] * 17,
    "FLUXALL": "1" * 61,
}
"""The vectors that LoRA Block Weight comes with, by name."""

_NUMBER = re.compile(r"[+-]?[0-9.]+(?:e[+-]?[0-9]+)?", re.IGNORECASE)
_DRAWN = re.compile(r"[RU]|X(?:[+-][0-9.]+)?", re.IGNORECASE)
"""What LoRA Block Weight draws at random (R, U), or takes from elsewhere in its tag (X)."""
_STACKS = {"input_blocks": "in", "output_blocks": "out", "double_blocks": "d", "single_blocks": "s"}
_ENDS = {"final_layer": "out", "img_in": "in", "txt_in": "in", "time_in": "in", "vector_in": "in", "guidance_in": "in"}


@dataclass(frozen=True)
class BlockWeights:
    """Multipliers by block name, in the order given: of several that name a module, the last counts."""

    weights: tuple[tuple[str, float], ...] = ()
    models: tuple[str, ...] = ()
    """Those that a vector is for."""

    @classmethod
    def parse(cls, text: str, setting: str) -> BlockWeights:
        """Read `up 1: 0.5, mid: 0`, a vector `1,0,0,…` or the name of one; else SettingsError with the `setting`."""
        if preset := PRESETS.get(text.strip().upper()):
            return cls._of_vector(preset, setting)
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if parts and all(_NUMBER.fullmatch(part) or _DRAWN.fullmatch(part) for part in parts):
            return cls._of_vector(parts, setting)
        found = []
        for part in parts:
            # In a tag, where a colon is the tag's own, an equals sign stands for it.
            name, separator, value = part.replace("=", ":").rpartition(":")
            if not separator or not name.strip():
                known = f"a vector, or one of {', '.join(PRESETS)}"
                raise SettingsError(setting, f"{part!r} is not a block with its multiplier, such as up 1: 0.5, {known}")
            found.append((_normal(name), check_weight(value.strip(), setting)))
        return cls(tuple(found))

    @classmethod
    def _of_vector(cls, values: Sequence[str], setting: str) -> BlockWeights:
        if drawn := next((value for value in values if _DRAWN.fullmatch(value)), None):
            raise SettingsError(setting, f"{drawn!r} stands for a number that is not in the vector; write the number")
        if len(values) not in VECTORS:
            known = ", ".join(f"{count} ({' and '.join(vector.models)})" for count, vector in VECTORS.items())
            raise SettingsError(setting, f"a vector of {len(values)} values is none of those known: {known}")
        models, blocks = VECTORS[len(values)]
        given = zip(blocks, (check_weight(value, setting) for value in values), strict=True)
        return cls((*((block, 0.0) for block in _all_blocks(models)), *given), models)

    def check(self, modules: Iterable[str], architecture: str | None, setting: str) -> None:
        """Raise SettingsError for a vector of another model, and for a name that none of the `modules` goes by.

        Where there are none, as on a side of weight 0, any name will do.
        """
        if self.models:
            if architecture not in self.models:
                ours, theirs = " and ".join(self.models), architecture or "an unknown architecture"
                raise SettingsError(setting, f"the vector is for {ours}, the LoRAs are for {theirs}")
            return
        modules = list(modules)
        if not self.weights or not modules:
            return
        known = {name for module in modules for name in names_of(module)} | {TEXT}
        for name, _ in self.weights:
            if name not in known:
                there = dict.fromkeys(block_label(block_of(module)) for module in modules)
                raise SettingsError(setting, f"{name!r} is no block of these LoRAs; there are {', '.join(there)}")

    def of(self, module: str) -> float:
        """The multiplier of a module of the diffusion model or of a text encoder."""
        if not self.weights:
            return 1.0
        names = names_of(module)
        return next((weight for name, weight in reversed(self.weights) if name in names), 1.0)


def block_weights(settings: Settings) -> tuple[BlockWeights, BlockWeights]:
    """Those of subject and style; SettingsError for a text that is none."""
    return (
        BlockWeights.parse(settings.subject_blocks, "subject_blocks"),
        BlockWeights.parse(settings.style_blocks, "style_blocks"),
    )


def _all_blocks(models: tuple[str, ...]) -> tuple[str, ...]:
    """The blocks of the longest vector for the same models."""
    return max((vector.blocks for vector in VECTORS.values() if vector.models == models), key=len)


def names_of(module: str) -> frozenset[str]:
    """All names, normalised, by which a module's block may be called, from the widest to the module itself."""
    parts = _normal(module).split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return frozenset((_normal(block_label(block_of(module))), *paths, *_codes(module)))


def _codes(module: str) -> Iterable[str]:
    """LoRA Block Weight's names for the block of a module: IN04, M00, OUT11, D18, S37, BASE."""
    if module.startswith("text_encoder"):
        return (TEXT, T5) if t5_path(module) else (TEXT,)
    # The one module of FLUX that is another, row by row, in its original code.
    paths = ["final_layer"] if module == "norm_out.linear" else [path for path, _ in ldm_names(module)]
    return filter(None, map(_code, paths))


def _code(ldm: str) -> str | None:
    """That of a path in a model's original code."""
    first, _, rest = ldm.partition(".")
    if first == "middle_block":
        return "m00"
    number = rest.partition(".")[0]
    if first in _STACKS and number.isdigit():
        return f"{_STACKS[first]}{int(number):02}"
    return _ENDS.get(first)


def _normal(name: str) -> str:
    return re.sub(r"[\s._]+", ".", name.strip().lower())
