"""alpha and rsLoRA from PEFT's config as JSON, which diffusers ≥ 0.34 keeps in the metadata `lora_adapter_metadata`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from klora.errors import LoraFileError

KEYS = ("lora_adapter_metadata", "lora_adapter_config", "adapter_config", "lora_config", "peft_config")
"""Under which names in the metadata it is found; all but the first are other people's."""
_CURE = "save the file again with a current diffusers, or remove this metadata"
_COMPONENTS = ("unet", "transformer", "text_encoder_2", "text_encoder")
_MAX_TEXT = 2**20
# A module's name as PEFT, or diffusers with its "^", writes it. The dots count as dots.
_LITERAL = re.compile(r"(\^?)((?:[\w\-]|\\?\.)+)")
# Other patterns come from the file too: what could take long to match is refused.
_PLAIN_REGEX = re.compile(r"[\w.\-\\^$|()*+?\[\]]{1,200}")
_MAX_REGEXES = 64
_MAX_WORK = 10_000


class Where(NamedTuple):
    """A file, and the key of the metadata that holds a config."""

    file: str
    source: str

    def error(self, reason: str) -> LoraFileError:
        """What is wrong with it."""
        return LoraFileError(self.file, reason, _CURE, self.source)


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


def read(metadata: Mapping[str, str], file: str, source: str) -> dict[str, AlphaConfig]:
    """The alpha of each component ("unet" stands for the diffusion model) in the config under the key `source`.

    Raises LoraFileError where it cannot be understood.
    """
    where = Where(file, source)
    if len(metadata[source]) > _MAX_TEXT:
        raise where.error(f"has {len(metadata[source])} characters, far too many")
    try:
        parsed = json.loads(metadata[source])
    except (ValueError, RecursionError):
        raise where.error("is not JSON") from None
    if not isinstance(parsed, dict):
        raise where.error("is not a table")
    by_component: dict[str, dict[str, Any]] = {}
    for key, value in parsed.items():
        component = next((c for c in _COMPONENTS if key.startswith(f"{c}.")), None)
        name = key[len(component) + 1 :] if component else key
        for place in [component] if component else ["unet", "text_encoder", "text_encoder_2"]:
            by_component.setdefault("unet" if place == "transformer" else str(place), {})[name] = value
    return {component: _config(values, where) for component, values in by_component.items()}


def _config(values: Mapping[str, Any], where: Where) -> AlphaConfig:
    alpha, patterns = values.get("lora_alpha"), values.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise where.error("has an alpha_pattern that is not a table")
    names: dict[str, tuple[int, float]] = {}
    endings: dict[str, tuple[int, float]] = {}
    regexes = []
    for order, (pattern, value) in enumerate(patterns.items()):
        found = (order, _number(value, where))
        if literal := _LITERAL.fullmatch(pattern):
            (names if literal[1] else endings).setdefault(literal[2].replace("\\", ""), found)
        else:
            regexes.append((order, pattern, found[1]))
    if len(regexes) > _MAX_REGEXES or sum(_work(pattern) for _, pattern, _ in regexes) > _MAX_WORK:
        raise where.error("has alpha patterns too complicated to be modules' names")
    default = None if alpha is None else _number(alpha, where)
    compiled = tuple((order, _regex(pattern, where), alpha) for order, pattern, alpha in regexes)
    return AlphaConfig(default, values.get("use_rslora") is True, names, endings, compiled)


def _work(pattern: str) -> int:
    """How many ways there are, at most, to try a pattern on a name of 64 characters."""
    if not _PLAIN_REGEX.fullmatch(pattern) or re.search(r"\)[*+?]|\\[0-9]", pattern):
        return _MAX_WORK + 1
    return int(64 ** len(re.findall(r"[*+?]", pattern)) * 2 ** pattern.count("|"))


def _regex(pattern: str, where: Where) -> re.Pattern[str]:
    try:
        return re.compile(rf"(?:.*\.)?(?:{pattern})$")
    except re.error:
        raise where.error("has an alpha pattern that is not a regular expression") from None


def _number(value: object, where: Where) -> float:
    # A JSON integer may be too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise where.error("has an alpha that is not a number")
    return float(value)
