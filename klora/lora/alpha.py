"""What a file's metadata say of alpha, for the modules without an alpha of their own.

diffusers and PEFT keep a config as JSON (`peft_alpha`); trainers and converters write plain texts, such as `lora_alpha`
beside `r`, or kohya's `ss_network_alpha` beside `ss_network_dim`, with a component of the pipeline in front or without.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from klora.errors import LoraFileError
from klora.lora import peft_alpha
from klora.lora.peft_alpha import AlphaConfig

_COMPONENT = r"(?:(?P<component>unet|transformer|diffusion_model|text_encoder(?:_[23])?)\.)?"
_ALPHA = re.compile(_COMPONENT + r"(?:ss_)?(?:lora_|network_)?alpha")
_RANK = re.compile(_COMPONENT + r"(?:r|lora_r|(?:ss_)?(?:lora_|network_)?(?:rank|dim))")
_RSLORA = re.compile(_COMPONENT + r"use_rslora")
_WRITTEN = re.compile(r"""(?:b?["']|tensor\()?([^"'(),]*)["')]?""")
_KOHYA, _ARGS = "ss_", "ss_network_args"
# `klora merge` once wrote kohya's keys into files whose modules have ranks of their own, each of which is its alpha.
_OWN = "klora"
_MAX_ARGS = 2**16
_CURE = "correct the metadata, or write each module's alpha into the file"


@dataclass(frozen=True)
class Reading:
    """What one entry of the metadata, `key`, says: alpha, and of which ranks where that is said beside it."""

    key: str
    alpha: float
    ranks: frozenset[float] = frozenset()
    rslora: bool = False

    def scale(self, rank: float) -> float:
        """alpha / rank, or alpha / √rank, of a module of that rank."""
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    def of(self, rank: int) -> Reading:
        """The reading for a module of that rank: where alpha is the rank that is said, it is each module's own."""
        own = self.alpha in self.ranks and rank not in self.ranks and not self.rslora
        return Reading(self.key, float(rank)) if own else self


class MetadataAlpha:
    """All that the metadata of a file say of alpha."""

    def __init__(self, metadata: Mapping[str, str], file: str) -> None:
        """Read them. Raises LoraFileError where a config is there but cannot be understood."""
        self._file = file
        configs = [key for key in peft_alpha.KEYS if _has_config(metadata, key)]
        self._configs = {key: peft_alpha.read(metadata, file, key) for key in configs}
        plain = {key: text for key, text in metadata.items() if not (_OWN in metadata and key.startswith(_KOHYA))}
        self._alphas = _numbers(plain, _ALPHA)
        self._ranks = _numbers(plain, _RANK)
        self._rslora = {key for key, text in plain.items() if _RSLORA.fullmatch(key) and text.lower() == "true"}
        self._conv = _conv(plain)

    def of(self, component: str, path: str, rank: int, kernel: bool, prefix: str) -> Reading | None:
        """What is said of the module at `path` of a component, of that rank, with a `kernel` larger than 1 or not.

        Raises LoraFileError, naming both readings, where two entries, or an alpha and the rank beside it, disagree.
        """
        config = self._configured(component, path, rank)
        plain = [self._conv] if kernel and self._conv else self._plain(component)
        readings = [reading.of(rank) for reading in (*config, *plain)]
        for reading in readings:
            if reading.ranks and rank not in reading.ranks:
                said = min(reading.ranks)
                told = (
                    f"{reading.key} gives a scale of {reading.scale(rank):g} for it, and {reading.scale(said):g} with"
                )
                raise self._disagree(rank, f"{told} the rank of {said:g} beside it", prefix)
            if not math.isclose(reading.scale(rank), readings[0].scale(rank), rel_tol=1e-6):
                told = f"{readings[0].key} gives it a scale of {readings[0].scale(rank):g}"
                raise self._disagree(rank, f"{told}, and {reading.key} one of {reading.scale(rank):g}", prefix)
        return readings[0] if readings else None

    def _configured(self, component: str, path: str, rank: int) -> Iterator[Reading]:
        for key, by_component in self._configs.items():
            config = by_component.get(component, AlphaConfig())
            alpha = config.of(path)
            if alpha is not None or config.rslora:
                yield Reading(key, float(rank) if alpha is None else alpha, rslora=config.rslora)

    def _plain(self, component: str) -> Iterator[Reading]:
        mine = ("", "unet", "transformer", "diffusion_model") if component == "unet" else ("", component)
        for key, (whose, alpha) in self._alphas.items():
            if whose in mine and alpha:
                kohya = key.startswith(_KOHYA)
                ranks = (
                    rank
                    for other, (its, rank) in self._ranks.items()
                    if its in mine and other.startswith(_KOHYA) == kohya and rank > 0
                )
                rslora = any(name.removesuffix("use_rslora").rstrip(".") in mine for name in self._rslora)
                yield Reading(key, alpha, frozenset(ranks), rslora)

    def _disagree(self, rank: int, told: str, prefix: str) -> LoraFileError:
        reason = f"has no alpha of its own and rank {rank}, for which the metadata disagree: {told}"
        return LoraFileError(self._file, reason, _CURE, prefix)


def _has_config(metadata: Mapping[str, str], key: str) -> bool:
    """Whether there is a config; under the keys that are not diffusers' own, anything else may be."""
    text = metadata.get(key, "")
    return key in metadata and (key == peft_alpha.KEYS[0] or (text.lstrip()[:1] == "{" and '"lora_alpha"' in text))


def _numbers(metadata: Mapping[str, str], pattern: re.Pattern[str]) -> dict[str, tuple[str, float]]:
    """(component, number) of the entries whose key matches; texts such as "None" and "Dynamic" are left."""
    found = {}
    for key, text in metadata.items():
        if (match := pattern.fullmatch(key)) and (number := _number(text)) is not None:
            found[key] = (match["component"] or "", number)
    return found


def _number(text: object) -> float | None:
    """The finite number that a text is, also as JSON or Python would write a text or a tensor of it."""
    written = _WRITTEN.fullmatch(str(text).strip())
    try:
        number = float(written[1] if written else "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _conv(metadata: Mapping[str, str]) -> Reading | None:
    """kohya's alpha for kernels larger than 1, among the arguments of the network."""
    text = metadata.get(_ARGS, "")
    try:
        args = json.loads(text) if len(text) < _MAX_ARGS else None
    except (ValueError, RecursionError):
        return None
    alpha, rank = (_number(args.get(name)) if isinstance(args, dict) else None for name in ("conv_alpha", "conv_dim"))
    return Reading(f"{_ARGS}: conv_alpha", alpha, frozenset({rank} if rank else ())) if alpha else None
