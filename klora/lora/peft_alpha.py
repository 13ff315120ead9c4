"""alpha and rsLoRA from the metadata that diffusers ≥ 0.34 keeps: `lora_adapter_metadata`, PEFT's config as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from klora.errors import LoraFileError

KEY = "lora_adapter_metadata"
_CURE = "save the file again with a current diffusers, or remove this metadata"
_COMPONENTS = ("unet", "transformer", "text_encoder_2", "text_encoder")
_LITERAL = re.compile(r"[\w.\-]+")
# A pattern comes from the file: what could take very long to match is refused.
_PLAIN_REGEX = re.compile(r"[\w.\-\\^$|()*+?\[\]]{1,200}")
_MAX_REPEATS = 2
_MAX_REGEXES = 64


@dataclass(frozen=True)
class AlphaConfig:
    """alpha of one component: a default, and patterns for single modules, matched as PEFT matches them."""

    alpha: float | None = None
    rslora: bool = False
    literals: dict[str, tuple[int, float]] = field(default_factory=dict)
    regexes: tuple[tuple[int, re.Pattern[str], float], ...] = ()

    def of(self, path: str) -> float | None:
        """alpha of the module at `path`: that of the first pattern which matches its end, or the default."""
        places = [i for i, c in enumerate(path) if c == "."]
        endings = [path, *(path[place + 1 :] for place in places)]
        found = [self.literals[ending] for ending in endings if ending in self.literals]
        found += [(order, alpha) for order, regex, alpha in self.regexes if regex.match(path)]
        return min(found)[1] if found else self.alpha


def read(metadata: Mapping[str, str], file: str) -> dict[str, AlphaConfig]:
    """The alpha of each component ("unet" stands for the diffusion model) named in the metadata of a file.

    Raises LoraFileError when it is there but cannot be understood.
    """
    if KEY not in metadata:
        return {}
    try:
        parsed = json.loads(metadata[KEY])
    except (ValueError, RecursionError):
        raise _error(file, "is no JSON") from None
    if not isinstance(parsed, dict):
        raise _error(file, "is no table")
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
        raise _error(file, "has an alpha_pattern that is no table")
    literals, regexes = {}, []
    for order, (pattern, value) in enumerate(patterns.items()):
        if _LITERAL.fullmatch(pattern):
            literals[pattern] = (order, _number(value, file))
        else:
            regexes.append((order, _regex(pattern, file), _number(value, file)))
    if len(regexes) > _MAX_REGEXES:
        raise _error(file, f"has {len(regexes)} alpha patterns, more than {_MAX_REGEXES}")
    default = None if alpha is None else _number(alpha, file)
    return AlphaConfig(default, values.get("use_rslora") is True, literals, tuple(regexes))


def _regex(pattern: str, file: str) -> re.Pattern[str]:
    repeats = len(re.findall(r"[*+?]", pattern))
    if not _PLAIN_REGEX.fullmatch(pattern) or repeats > _MAX_REPEATS or re.search(r"\)[*+?]|\\[0-9]", pattern):
        raise _error(file, "has an alpha pattern too complicated to be a module's name")
    try:
        return re.compile(rf"(?:.*\.)?(?:{pattern})$")
    except re.error:
        raise _error(file, "has an alpha pattern that is no regular expression") from None


def _number(value: object, file: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _error(file, "has an alpha that is no number")
    return float(value)


def _error(file: str, reason: str) -> LoraFileError:
    return LoraFileError(file, reason, _CURE, KEY)
