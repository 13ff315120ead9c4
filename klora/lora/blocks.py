"""Multipliers of a LoRA by block: by the names that maps show, by paths, and in the vectors of LoRA Block Weight."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from klora.errors import SettingsError
from klora.lora.names import block_label, block_of, ldm_names
from klora.lora.weighted import check_weight

TEXT = "base"
"""What LoRA Block Weight calls the text encoder."""


def _numbered(letter: str, *numbers: int) -> list[str]:
    return [f"{letter}{number:02}" for number in numbers]


_MIDDLE = ["m00"]
VECTORS: dict[int, tuple[str, list[str]]] = {
    12: ("SDXL", [TEXT, *_numbered("in", 4, 5, 7, 8), *_MIDDLE, *_numbered("out", *range(6))]),
    17: ("SD1", [TEXT, *_numbered("in", 1, 2, 4, 5, 7, 8), *_MIDDLE, *_numbered("out", *range(3, 12))]),
    20: ("SDXL", [TEXT, *_numbered("in", *range(9)), *_MIDDLE, *_numbered("out", *range(9))]),
    26: ("SD1", [TEXT, *_numbered("in", *range(12)), *_MIDDLE, *_numbered("out", *range(12))]),
    61: (
        "FLUX",
        [TEXT, "t5", "in", *_numbered("d", *range(19)), *_numbered("s", *range(38)), "out"],
    ),
}
"""By the number of values: the model that a vector is for, and the blocks in its order."""

_NUMBER = re.compile(r"[+-]?[0-9.]+(?:e[+-]?[0-9]+)?", re.IGNORECASE)
_STACKS = {"input_blocks": "in", "output_blocks": "out", "double_blocks": "d", "single_blocks": "s"}
_ENDS = {"final_layer": "out", "img_in": "in", "txt_in": "in", "time_in": "in", "vector_in": "in", "guidance_in": "in"}


@dataclass(frozen=True)
class BlockWeights:
    """Multipliers by block name, in the order given: of several that name a module, the last counts."""

    weights: tuple[tuple[str, float], ...] = ()
    vector_for: str | None = None

    @classmethod
    def parse(cls, text: str, setting: str) -> BlockWeights:
        """Read `up 1: 0.5, mid: 0`, or a vector `1,0,0,…`; SettingsError, naming the `setting`, for anything else."""
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if parts and all(_NUMBER.fullmatch(part) for part in parts):
            return cls._vector(parts, setting)
        found = []
        for part in parts:
            # In a tag, where a colon is the tag's own, an equals sign stands for it.
            name, separator, value = part.replace("=", ":").rpartition(":")
            if not separator or not name.strip():
                raise SettingsError(setting, f"{part!r} is not a block with its multiplier, such as up 1: 0.5")
            found.append((_normal(name), check_weight(value.strip(), setting)))
        return cls(tuple(found))

    @classmethod
    def _vector(cls, parts: list[str], setting: str) -> BlockWeights:
        if len(parts) not in VECTORS:
            known = ", ".join(f"{count} ({model})" for count, (model, _) in VECTORS.items())
            raise SettingsError(setting, f"a vector of {len(parts)} values is none of those known: {known}")
        model, names = VECTORS[len(parts)]
        return cls(tuple(zip(names, (check_weight(part, setting) for part in parts), strict=True)), model)

    def check(self, modules: Iterable[str], architecture: str | None, setting: str) -> None:
        """Raise SettingsError for a vector of another model, and for a name that none of the `modules` goes by."""
        if self.vector_for is not None:
            if self.vector_for != architecture:
                model = architecture or "an unknown architecture"
                raise SettingsError(setting, f"the vector is for {self.vector_for}, the LoRAs are for {model}")
            return
        if not self.weights:
            return
        modules = list(modules)
        known = {name for module in modules for name in names_of(module)} | {TEXT}
        for name, _ in self.weights:
            if name not in known:
                there = dict.fromkeys(block_label(block_of(module)) for module in modules)
                raise SettingsError(setting, f"{name!r} is no block of these LoRAs; there are {', '.join(there)}")

    def of(self, module: str) -> float:
        """The multiplier of a module of the diffusion model."""
        if not self.weights:
            return 1.0
        names = names_of(module)
        return next((weight for name, weight in reversed(self.weights) if name in names), 1.0)

    @property
    def text_encoder(self) -> float:
        """The multiplier of the text encoder's modules."""
        return dict(self.weights).get(TEXT, 1.0)


def names_of(module: str) -> frozenset[str]:
    """All names, normalised, by which a module's block may be called, from the widest to the module itself."""
    parts = _normal(module).split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    codes = [code for ldm, _ in ldm_names(module) if (code := _code(ldm))]
    return frozenset((_normal(block_label(block_of(module))), *paths, *codes))


def _code(ldm: str) -> str | None:
    """LoRA Block Weight's name for the block of a module in a model's original code: IN04, M00, OUT11, D18, S37."""
    first, _, rest = ldm.partition(".")
    if first == "middle_block":
        return "m00"
    number = rest.partition(".")[0]
    if first in _STACKS and number.isdigit():
        return f"{_STACKS[first]}{int(number):02}"
    return _ENDS.get(first)


def _normal(name: str) -> str:
    return re.sub(r"[\s._]+", ".", name.strip().lower())
