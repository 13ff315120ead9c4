"""alpha and rsLoRA from the metadata that diffusers ≥ 0.34 keeps: `lora_adapter_metadata`, PEFT's config as JSON."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from klora.errors import LoraFileError

KEY = "lora_adapter_metadata"
_CURE = "save the file again with a current diffusers, or remove this metadata"
_COMPONENTS = ("unet", "transformer", "text_encoder_2", "text_encoder")
_MAX_TEXT = 2**20
# A module's name as PEFT, or diffusers with its "^", writes it. The dots count as dots.
_LITERAL = re.compile(r"(\^?)((?:[\w\-]|\\?\.)+)")
# Other patterns come from the file too: what could take long to match is refused.
_PLAIN_REGEX = re.compile(r"[\w.\-\\^$|()*+?\[\]]{1,200}")
_MAX_REGEXES = 64
_MAX_WORK = 10_000


@dataclass(frozen=True)
class AlphaConfig:
    """alpha of one component: a default, and patterns for single modules, matched as PEFT matches them.

    `names` are whole paths, `endings` the ends of paths, `regexes` the rest, each with its place in the file.
    """

    alpha: float | None = None
    rslora: bool = False
    names: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    endings: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    regexes: tuple[tuple[int, re.Pattern[str], float], ...] = ()

    def of(self, path: str) -> float | None:
        """alpha of the module at `path`: that of the first pattern which matches its end, or the default."""
        places = [i for i, c in enumerate(path) if c == "."]
        endings = [path, *(path[place + 1 :] for place in places)]
        found = [self.endings[ending] for ending in endings if ending in self.endings]
        found += [self.names[path]] if path in self.names else []
        found += [(order, alpha) for order, regex, alpha in self.regexes if regex.match(path)]
        return min(found)[1] if found else self.alpha


def read(metadata: Mapping[str, str], file: str) -> dict[str, AlphaConfig]:
    """The alpha of each component ("unet" stands for the diffusion model) named in the metadata of a file.

    Raises LoraFileError when it is there but cannot be understood.
    """
    if KEY not in metadata:
        return {}
    if len(metadata[KEY]) > _MAX_TEXT:
        raise _error(file, f"has {len(metadata[KEY])} characters, far too many")
    try:
        parsed = json.loads(metadata[KEY])
    except (ValueError, RecursionError):
        raise _error(file, "is not JSON") from None
    if not isinstance(parsed, dict):
        raise _error(file, "is not a table")
    by_component: dict[str, dict[str, Any]] = {}
    for key, value in parsed.items():
        component = next((c for c in _COMPONENTS if key.startswith(f"{c}.")), None)
        name = key[len(component) + 1 :] if component else key
        for place in [component] if component else ["unet", "text_encoder", "text_encoder_2"]:
            by_component.setdefault("unet" if place == "transformer" else str(place), {})[name] = value
    return {component: _config(values, file) for component, values in by_component.items()}


def _config(values: Mapping[str, Any], file: str) -> AlphaConfig:
    alpha, patterns = values.get("lora_alpha"), values.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise _error(file, "has an alpha_pattern that is not a table")
    names: dict[str, tuple[int, float]] = {}
    endings: dict[str, tuple[int, float]] = {}
    regexes = []
    for order, (pattern, value) in enumerate(patterns.items()):
        found = (order, _number(value, file))
        if literal := _LITERAL.fullmatch(pattern):
            (names if literal[1] else endings).setdefault(literal[2].replace("\\", ""), found)
        else:
            regexes.append((order, pattern, found[1]))
    if len(regexes) > _MAX_REGEXES or sum(_work(pattern) for _, pattern, _ in regexes) > _MAX_WORK:
        raise _error(file, "has alpha patterns too complicated to be modules' names")
    default = None if alpha is None else _number(alpha, file)
    compiled = tuple((order, _regex(pattern, file), alpha) for order, pattern, alpha in regexes)
    return AlphaConfig(default, values.get("use_rslora") is True, names, endings, compiled)


def _work(pattern: str) -> int:
    """How many ways there are, at most, to try a pattern on a name of 64 characters."""
    if not _PLAIN_REGEX.fullmatch(pattern) or re.search(r"\)[*+?]|\\[0-9]", pattern):
        return _MAX_WORK + 1
    return int(64 ** len(re.findall(r"[*+?]", pattern)) * 2 ** pattern.count("|"))


def _regex(pattern: str, file: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(?:.*\.)?(?:{pattern})$")
    except re.error:
        raise _error(file, "has an alpha pattern that is not a regular expression") from None


def _number(value: object, file: str) -> float:
    # A JSON integer may be too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise _error(file, "has an alpha that is not a number")
    return float(value)


def _error(file: str, reason: str) -> LoraFileError:
    return LoraFileError(file, reason, _CURE, KEY)
