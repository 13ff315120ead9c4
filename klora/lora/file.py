"""A LoRA as a whole: what a file, or a state dict in memory, holds, under canonical names or those of a model."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Container, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from klora.errors import LoraFileError, MismatchError
from klora.lora.container import TensorFile
from klora.lora.deltas import Delta, FileDelta
from klora.lora.deltas.base import size
from klora.lora.fit import Places, at_place, fitted
from klora.lora.memory import TensorsInMemory
from klora.lora.model_index import ModelIndex, Place, Shape, flat
from klora.lora.names import Target, bare, sort_key
from klora.lora.parameters import ParameterDelta
from klora.lora.parsed import ParsedFile, twice
from klora.lora.source import TensorSource
from klora.lora.tables import architecture_of
from klora.text import printable

if TYPE_CHECKING:
    from torch import Tensor

_DIGEST = re.compile("[0-9a-f]{12,64}")

LoraSource = str | os.PathLike[str] | Mapping[str, "Tensor"]
"""A LoRA as people have it: the path of a .safetensors file, or a state dict in memory."""


class LoraFile:
    """A parsed file under names: those of the tables by rule, of a model at hand, or its own bare ones, flattened.

    `modules` and `text_encoder` hold the deltas by name, in network order; `parameters` what the file makes of others
    of the model's parameters, by their path; `unmatched` the full keys that were not understood. `table` says by which
    rule all of the file can be named. Tensors are read when they are used.
    """

    def __init__(
        self,
        parsed: ParsedFile,
        places: Places,
        parameters: Mapping[str, ParameterDelta],
        first: LoraFile | None = None,
    ) -> None:
        """Name what was parsed; `first` is the file as it was opened. LoraFileError for two deltas in one module."""
        self._parsed = parsed
        self._places = places
        self._first = first or self
        self._views: WeakValueDictionary[object, LoraFile] = WeakValueDictionary()
        source = parsed.source
        self.path, self.name, self.where = source.path, source.name, source.file
        self.identity, self.metadata = source.identity, source.metadata
        self.table, self.kernels = parsed.table, parsed.kernels
        self.parameters = parameters
        self.unmatched = list(parsed.unread)
        changed = {one.key for one in parameters.values()}
        modules: dict[str, FileDelta] = {}
        text_encoder: dict[str, FileDelta] = {}
        for prefix, delta in parsed.deltas.items():
            named = text_encoder if parsed.is_text(prefix) else modules
            if not places[prefix] and not changed & {*parsed.keys[prefix].values()}:
                self.unmatched.extend(parsed.keys[prefix].values())
            for place in places[prefix]:
                if place.name in named:
                    raise twice(source.file, named[place.name].key, delta.key)
                named[place.name] = at_place(delta, place)
        self.modules, self.text_encoder = _in_order(modules), _in_order(text_encoder)

    @classmethod
    def open(cls, lora: LoraSource | TensorSource, name: str = "LoRA (in memory)") -> LoraFile:
        """Read the header of a .safetensors file, or copy a state dict, and understand it.

        `name` is what messages call a state dict. Raises LoraFileError naming file, key and cure for anything that
        cannot be read or understood, and its subclass UnsupportedFormatError for pickles, OFT, BOFT, GLoRA and IA3.
        Values are checked when they are used.
        """
        if isinstance(lora, Mapping):
            lora = TensorsInMemory(lora, name)
        parsed = ParsedFile.parse(lora if isinstance(lora, TensorSource) else TensorFile(Path(lora)))
        places = _places(parsed, _by_rule if parsed.table else _bare_place)
        first = cls(parsed, places, {flat(one.paths[0]): one for one in parsed.parameters})
        first._views[first._key] = first
        return first

    def __repr__(self) -> str:
        return f"LoraFile({self.where!r}, {len(self.modules)} modules, {self.architecture})"

    @cached_property
    def architecture(self) -> str | None:
        """The model it was made for, "SD1", "SD2", "SDXL" or "FLUX"; None where the file does not tell."""
        return architecture_of(self.table, self._first.modules, self._parsed.deltas, self.metadata)

    @property
    def is_peft(self) -> bool:
        """Whether its factors are called lora_A and lora_B."""
        return any("lora_A" in slots.get("down", "") for slots in self._parsed.keys.values())

    @property
    def alpha_from(self) -> str:
        """Where its modules have their alpha from: keys, an entry of the metadata, the rank, or several of these.

        Empty where none has an alpha: of full differences and rank 0.
        """
        return " and ".join({"rank": "the rank"}.get(source, source) for source in self._parsed.alphas)

    @property
    def alpha_is_told(self) -> bool:
        """Whether all that have an alpha have it from keys of their own, as most files do."""
        return self._parsed.alphas.keys() <= {"keys"}

    @property
    def label(self) -> str:
        """How messages call it: its path, on one line."""
        return printable(self.where)

    @property
    def file_name(self) -> str:
        """The file's name alone, or what a state dict is called."""
        return self.path.name if self.path else self.name

    @property
    def made_for(self) -> str:
        """How messages call the model that it was made for."""
        return self.architecture or ("an unknown UNet" if self.table == "unet" else "an unknown architecture")

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the file that was opened; LoraFileError where it has changed since."""
        return self._parsed.source.sha256()

    @cached_property
    def model_hash(self) -> str:
        """The digest by which trainers, WebUIs and image sites know a LoRA: of its tensors, or what its metadata say.

        LoraFileError where the file has changed since it was opened.
        """
        said = self.metadata.get("sshs_model_hash", "")
        return said if _DIGEST.fullmatch(said) else self._parsed.source.tensors_sha256()

    @cached_property
    def naming(self) -> str:
        """Tells names and shapes of the modules apart from those that the file was opened with; empty if equal."""
        first = {name: delta.shape for name, delta in self._first.modules.items()}
        own = {name: delta.shape for name, delta in self.modules.items()}
        if own == first:
            return ""
        told = "\n".join(name if first.get(name, shape) == shape else f"{name} {shape}" for name, shape in own.items())
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    @property
    def finite(self) -> bool:
        """Whether its values are known to be numbers, neither NaN nor infinity."""
        return self._parsed.source.finite

    def know_finite(self) -> None:
        """Take its values for numbers from now on: somebody has looked at all of them before."""
        self._parsed.source.finite = True

    def check_finite(self, scored: Container[str] = ()) -> None:
        """Look at all values, unless that has been done: LoraValueError, naming the key, for NaN or infinity.

        `scored`: the modules whose sums are known to be finite, so that only what these do not tell is looked at.
        """
        if self.finite:
            return
        for name, delta in self.modules.items():
            delta.check_finite(name in scored)
        for delta in self.text_encoder.values():
            delta.check_finite()
        for parameter in self.parameters.values():
            parameter.check_finite()
        self.know_finite()

    def for_model(self, index: ModelIndex) -> LoraFile:
        """The same file with its modules under the names of a model; those that it lacks keep theirs.

        Raises MismatchError where a fused weight cannot be split into the parts that the model has.
        """
        parsed = self._parsed
        shapes = {prefix: delta.shape for prefix, delta in parsed.deltas.items() if not parsed.is_text(prefix)}
        try:
            found = index.locate(shapes)
        except ValueError as error:
            reason = f"does not fit the model: {error}"
            raise LoraFileError(self.where, reason, "the file is damaged or made for another model") from None
        for prefix, there in found.items():
            self._check_height(parsed.deltas[prefix], there)
        by_rule = _by_rule if self.table else _bare_place

        def place(file: ParsedFile, prefix: str) -> tuple[Place, ...]:
            return found[prefix] if prefix in found else by_rule(file, prefix)

        text = {name: delta.shape for name, delta in self._first.text_encoder.items()}
        places = _places(parsed, place, index.text_names(text))
        full = {prefix: both for prefix in shapes if prefix not in found and (both := parsed.as_parameters(prefix))}
        others = [*parsed.parameters, *(one for both in full.values() for one in both)]
        named = {name: one for one in others if (name := index.parameter(one.paths, one.shape))}
        absent = {flat(one.paths[0]): one for one in parsed.parameters if one not in named.values()}
        places |= {prefix: () for prefix, both in full.items() if both[0] in named.values()}
        return self._named(fitted(parsed.deltas, places, index.shapes), {**named, **absent})

    def bare(self) -> LoraFile:
        """The same file with its modules under their own bare names, as where no table fits."""
        return self._named(_places(self._parsed, _bare_place), self._first.parameters)

    def in_shapes(self, shapes: Mapping[str, Shape]) -> LoraFile:
        """The same file with its modules in the shapes that these have by name, as far as they fit them."""
        return self._named(fitted(self._parsed.deltas, self._places, shapes), self.parameters)

    def _check_height(self, delta: Delta, places: tuple[Place, ...]) -> None:
        last = places[-1].rows if places else None
        if last and last[1] != delta.shape[0]:
            raise MismatchError(
                f"{self.label} is for {self.made_for}: its {delta.key} is {size(delta.shape)}, in the model it has"
                f" {last[1]} rows; choose a LoRA made for this model"
            )

    @property
    def _key(self) -> object:
        return tuple(self._places.values()), tuple(self.parameters)

    def _named(self, places: Places, parameters: Mapping[str, ParameterDelta]) -> LoraFile:
        """The file under other names; the same object for the same names, since much is kept by it."""
        view = LoraFile(self._parsed, places, parameters, self._first)
        return self._first._views.setdefault(view._key, view)


def _places(
    parsed: ParsedFile,
    place: Callable[[ParsedFile, str], tuple[Place, ...]],
    text_names: Mapping[str, str] | None = None,
) -> dict[str, tuple[Place, ...]]:
    """Where each delta acts: as `place` says, and in text encoders by rule, or as `text_names` has it."""
    return {
        prefix: tuple(one._replace(name=(text_names or {}).get(one.name, one.name)) for one in _by_rule(parsed, prefix))
        if parsed.is_text(prefix)
        else place(parsed, prefix)
        for prefix in parsed.deltas
    }


def _by_rule(parsed: ParsedFile, prefix: str) -> tuple[Place, ...]:
    delta, targets = parsed.deltas[prefix], parsed.targets[prefix]
    rows = [_rows(target, delta) for target in targets]
    if targets and rows[-1][1] != delta.shape[0]:
        raise _not_fused(delta)
    return tuple(Place(target.name, span) for target, span in zip(targets, rows, strict=True))


def _bare_place(parsed: ParsedFile, prefix: str) -> tuple[Place, ...]:
    return (Place(flat(bare(prefix))),)


def _rows(target: Target, delta: Delta) -> tuple[int, int]:
    try:
        return target.rows(*delta.shape[:2])
    except ValueError:
        raise _not_fused(delta) from None


def _not_fused(delta: Delta) -> LoraFileError:
    reason = f"is {size(delta.shape)}, which cannot be split into q, k, v (and mlp) of that width"
    cure = "the file is damaged or made for another model"
    return LoraFileError(delta.file, reason, cure, delta.key)


def _in_order(table: dict[str, FileDelta]) -> dict[str, FileDelta]:
    return dict(sorted(table.items(), key=lambda item: sort_key(item[0])))
