"""One side of a fusion: a LoRA, or a weighted sum of several, ΔW = Σ w_i·ΔW_i, seen as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from os import PathLike
from typing import NamedTuple
from weakref import WeakValueDictionary

from klora.errors import SettingsError
from klora.lora.deltas import Delta, FileDelta
from klora.lora.deltas.computed import SumDelta
from klora.lora.file import LoraFile, LoraSource
from klora.lora.model_index import ModelIndex, Shape
from klora.lora.names import sort_key
from klora.lora.parameters import ParameterDelta
from klora.lora.source import TensorSource
from klora.lora.weighted import check_weight, weighted_name
from klora.text import printable

WeightedSource = tuple[LoraSource, float]
SideSource = LoraSource | WeightedSource | Sequence[LoraSource | WeightedSource]
"""A side as people have it: a LoRA, a LoRA with its weight, or several of either."""


class WeightedLora(NamedTuple):
    """A LoRA of a side, and its weight in the sum."""

    lora: LoraFile
    weight: float = 1.0

    @property
    def name(self) -> str:
        """Its name, with the weight where that is not 1: dog*0.8."""
        return weighted_name(self.lora.name, self.weight)


@dataclass(frozen=True)
class Side:
    """The parts in the order in which they were given; which that is changes nothing but names.

    `modules` and `text_encoder` hold the deltas by name, in network order: of one part with the weight 1 they are the
    file's own. A part with the weight 0 is as if it were not there.
    """

    parts: tuple[WeightedLora, ...]
    _views: WeakValueDictionary[tuple[WeightedLora, ...], Side] = field(
        default_factory=WeakValueDictionary, compare=False, repr=False
    )

    @classmethod
    def of(cls, sources: Iterable[tuple[LoraSource | TensorSource, float]], name: str) -> Side:
        """Open the files; LoraFileError for a bad one. `name` is what messages call state dicts in memory."""
        return cls(tuple(WeightedLora(LoraFile.open(source, name), weight) for source, weight in sources))

    @classmethod
    def alone(cls, lora: LoraFile) -> Side:
        """The side of one file."""
        return cls((WeightedLora(lora),))

    @cached_property
    def acting(self) -> tuple[WeightedLora, ...]:
        """The parts that are there, in an order that does not depend on the given one."""
        there = [part for part in self.parts if part.weight]
        return tuple(sorted(there, key=lambda part: (part.lora.where, str(part.lora.identity), part.weight)))

    @cached_property
    def modules(self) -> Mapping[str, Delta]:
        """The deltas of the diffusion model's modules."""
        return _sums([(part.lora.modules, part.weight) for part in self.acting])

    @cached_property
    def text_encoder(self) -> Mapping[str, Delta]:
        """The deltas of the text encoders' modules."""
        return _sums([(part.lora.text_encoder, part.weight) for part in self.acting])

    @cached_property
    def parameters(self) -> Mapping[str, tuple[tuple[ParameterDelta, float], ...]]:
        """What the parts make of other parameters than modules' weights, by path: each with its weight in the sum."""
        found: dict[str, tuple[tuple[ParameterDelta, float], ...]] = {}
        for part in self.acting:
            for path, delta in part.lora.parameters.items():
                found[path] = (*found.get(path, ()), (delta, part.weight))
        return found

    @property
    def loras(self) -> tuple[LoraFile, ...]:
        """The files."""
        return tuple(part.lora for part in self.parts)

    @property
    def name(self) -> str:
        """The names of its parts: dog*0.8 + coat."""
        return " + ".join(part.name for part in self.parts)

    @property
    def unmatched(self) -> list[str]:
        """The full keys that were not understood, of all parts."""
        return [key for lora in self.loras for key in lora.unmatched]

    @property
    def kernels(self) -> frozenset[str]:
        """The prefixes of deltas stored as a convolution's, of all parts."""
        return frozenset[str]().union(*(lora.kernels for lora in self.loras))

    @property
    def is_named_by_rule(self) -> bool:
        """Whether a rule is known by which each part can be named."""
        return all(lora.table for lora in self.loras)

    @property
    def architecture(self) -> str | None:
        """The model that its parts were made for; None where none of them tells."""
        return next((found for lora in self.loras if (found := lora.architecture)), None)

    @property
    def identity(self) -> tuple[tuple[object, float], ...]:
        """Differs from that of any other content."""
        return tuple((part.lora.identity, part.weight) for part in self.acting)

    @property
    def finite(self) -> bool:
        """Whether the values of all parts are known to be numbers, neither NaN nor infinity."""
        return all(part.lora.finite for part in self.acting)

    def know_finite(self) -> None:
        """Take the values for numbers from now on: somebody has looked at all of them before."""
        for part in self.acting:
            part.lora.know_finite()

    def check_finite(self, scored: Iterable[str] = ()) -> None:
        """Look at all values, unless that has been done: LoraValueError, naming file and key, for NaN or infinity.

        `scored`: the modules whose sums are known to be finite, so that only what these do not tell is looked at.
        """
        known = frozenset(scored)
        for part in self.acting:
            part.lora.check_finite(known)

    def bare(self) -> Side:
        """The same with all modules under their files' own bare names."""
        return self._named([lora.bare() for lora in self.loras])

    def for_model(self, index: ModelIndex) -> Side:
        """The same under the names of a model; MismatchError where a fused weight cannot be split as it is."""
        return self._named([lora.for_model(index) for lora in self.loras])

    def in_shapes(self, shapes: Mapping[str, Shape]) -> Side:
        """The same with the modules of its files in these shapes, by name, as far as they fit them."""
        return self._named([lora.in_shapes(shapes) for lora in self.loras])

    def _named(self, loras: Iterable[LoraFile]) -> Side:
        """The same of files under other names; the same object for the same ones, since much is kept by its deltas."""
        parts = tuple(part._replace(lora=lora) for part, lora in zip(self.parts, loras, strict=True))
        if parts == self.parts:
            return self
        if (view := self._views.get(parts)) is None:
            view = self._views[parts] = Side(parts, self._views)
        return view


def _sums(parts: Sequence[tuple[Mapping[str, FileDelta], float]]) -> Mapping[str, Delta]:
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    terms: dict[str, list[FileDelta]] = {}
    for deltas, weight in parts:
        for name, delta in deltas.items():
            terms.setdefault(name, []).append(delta.times(weight))
    found = {name: one[0] if len(one) == 1 else SumDelta.of(one) for name, one in terms.items()}
    return dict(sorted(found.items(), key=lambda item: sort_key(item[0])))


def read_side(source: SideSource, side: str) -> list[tuple[LoraSource, float]]:
    """The LoRAs of a side, each with its weight; SettingsError, naming the `side`, for what is none."""
    if isinstance(source, (str, PathLike, Mapping)):
        return [(source, 1.0)]
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], Real):
        return [_weighted(source, side)]
    if not isinstance(source, Sequence) or isinstance(source, (bytes, bytearray)) or not source:
        raise SettingsError(side, f"{printable(repr(source))} is not a LoRA, nor a list of LoRAs or of (LoRA, weight)")
    return [_weighted(one if isinstance(one, tuple) else (one, 1.0), side) for one in source]


def _weighted(pair: tuple[object, ...], side: str) -> tuple[LoraSource, float]:
    if len(pair) != 2 or not isinstance(pair[0], (str, PathLike, Mapping)):
        raise SettingsError(side, f"{printable(repr(pair))} is not (LoRA, weight)")
    return pair[0], check_weight(pair[1], side)
