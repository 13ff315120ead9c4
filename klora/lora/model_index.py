"""The names of a model at hand: under which spellings a file may mean which of its weights.

Works for any architecture, since nothing is looked up but what the model itself, or its host, says of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from klora.lora.names import Kind, bare, kind_of, resolve, spellings
from klora.lora.numbered import unet_names
from klora.lora.renames import fused, renamed, renamed_ending, renamed_whole
from klora.lora.text_names import t5_path

Rows = tuple[int, int]
Shape = tuple[int, ...]


class Place(NamedTuple):
    """A module that a file's weight acts in.

    `rows` [start, stop) of that weight do, None: all of them; `shape` is that of the layer, where these have another.
    """

    name: str
    rows: Rows | None = None
    shape: Shape | None = None


class ModelIndex:
    """Looks a file's keys up in a model whose weights have these `shapes`, by canonical name.

    `aliases` are other spellings of the host's own, each of one or several of those names, in the order of the rows.
    `architecture` is SD1, SD2, SDXL, FLUX, or None for any other. `translate` says where the weights of a whole file
    act that is written in names of others still. `text_encoder` are the shapes of the text encoders' modules,
    `parameters` the shapes of the model's other parameters by their path.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        aliases: Mapping[str, Sequence[str]] | None = None,
        architecture: str | None = None,
        translate: Callable[[Mapping[str, Shape]], Mapping[str, tuple[Place, ...]]] | None = None,
        text_encoder: Mapping[str, Shape] | None = None,
        parameters: Mapping[str, Shape] | None = None,
    ) -> None:
        self.shapes = shapes
        self.architecture = architecture
        self._translate = translate
        self._text = text_encoder or {}
        self._t5 = {path: name for name in self._text if (path := t5_path(name))}
        # A host may have a name under one prefix alone, such as "transformer.", and a file under another.
        known = {bare(alias): tuple(names) for alias, names in (aliases or {}).items()}
        known |= {name: (name,) for name in shapes}
        # What one model calls a whole path is surer than an ending that several have: the latter gives way.
        self._names = {
            flat(other): names
            for rename in (renamed_ending, renamed_whole)
            for name, names in known.items()
            for other in rename(name)
        }
        # As old attention processors call it.
        self._names |= {flat(name.removesuffix(".0")): (name,) for name in shapes if name.endswith(".to_out.0")}
        self._originals = self._names.keys() - {flat(name) for name in shapes}
        self._fused = {flat(whole): parts for whole, parts in fused(shapes)}
        self._names |= {flat(name): names for name, names in known.items()}
        self.parameters = parameters or {}
        self._attention = {
            names[0] for alias, names in (aliases or {}).items() if len(names) == 1 and kind_of(alias) == "attention"
        }

    def locate(self, file: Mapping[str, Shape]) -> dict[str, tuple[Place, ...]]:
        """Where the weights of a file, whose shapes go by its own prefixes, act; without what the model does not have.

        Raises ValueError where a weight is fused and cannot be split into the parts that the model has.
        """
        found = {prefix: places for prefix, shape in file.items() if (places := self.find(prefix, shape))}
        found |= {
            prefix: (Place(name),) for prefix, name in unet_names(file, self.shapes).items() if name in self.shapes
        }
        if self._translate and len(found) < len(file):
            found = {**self._translate(file), **found}
            # A loader that knows no file of this kind may know some of its names.
            for prefix in file.keys() - found.keys():
                found |= self._translate({prefix: file[prefix]})
        return self._without_repeated(found)

    def _without_repeated(self, found: dict[str, tuple[Place, ...]]) -> dict[str, tuple[Place, ...]]:
        """Leave out what a file has under the names of the original code, where it has it under the model's own too.

        Trainers of Z-Image write qkv beside q, k and v; the loaders that know them take the parts.
        """
        own = {place.name for prefix, places in found.items() if not self._is_original(prefix) for place in places}
        repeated = {prefix for prefix, places in found.items() if {place.name for place in places} <= own}
        return {
            prefix: () if prefix in repeated and self._is_original(prefix) else places
            for prefix, places in found.items()
        }

    def _is_original(self, prefix: str) -> bool:
        """Whether a prefix is in the names of the original code, and neither the model's own nor one by rule."""
        found = next((one for one in spellings(prefix) if one in self._names or one in self._fused), None)
        return found in self._originals or found in self._fused

    def parameter(self, paths: Iterable[str], shape: Shape) -> str | None:
        """Which of the model's other parameters has one of these paths and that shape; None where it has none."""
        for path in paths:
            for spelling in (*spellings(path), _by_rule(path)):
                name = self._parameters.get(spelling)
                if name and same_numbers(self.parameters[name], shape):
                    return name
        return None

    @cached_property
    def _parameters(self) -> dict[str, str]:
        """The other parameters by all that they may be called."""
        return {
            other: name
            for name in self.parameters
            for other in (*map(flat, renamed(name)), _by_rule(name), next(spellings(name), name))
        }

    def find(self, prefix: str, shape: Shape) -> tuple[Place, ...] | None:
        """Where a weight of `shape` under a file's own key prefix acts; None where the model has no such module.

        The model's own names and its host's come first, then the tables by rule, then the fused weights of original
        code. Raises ValueError where a weight is fused and cannot be split into the parts that the model has.
        """
        for spelling in spellings(prefix):
            if names := self._names.get(spelling):
                return tuple(self._split(names))
        targets = resolve(prefix) or ()
        if targets and all(target.name in self.shapes for target in targets):
            return tuple(Place(target.name, target.rows(*shape[:2]) if target.fused else None) for target in targets)
        parts = next((self._fused[spelling] for spelling in spellings(prefix) if spelling in self._fused), None)
        return tuple(self._split(parts)) if parts else None

    def text_names(self, file: Mapping[str, Shape]) -> dict[str, str]:
        """What the modules of text encoders that a file changes, with these shapes, are called in the model.

        The T5 is the first, second or third of its encoders. A CLIP that is the only one of both is that, whichever
        number the file gives it.
        """
        found = {name: self._t5.get(t5_path(name), name) for name in file}
        clip, ours = ({_root(name) for name in names if not t5_path(name)} for names in (file, self._text))
        if len(clip) == 1 == len(ours):
            root = next(iter(ours))
            moved = {name: root + name.removeprefix(_root(name)) for name in file if not t5_path(name)}
            if all(self._text.get(name) == file[old] for old, name in moved.items()):
                found |= moved
        return found

    def kind_of(self, name: str, shape: Shape) -> Kind:
        """What a module is by any of its names: rows of `linear1` are attention where the host calls them `to_q`."""
        return "attention" if name in self._attention else kind_of(name, shape)

    def _split(self, names: tuple[str, ...]) -> Iterable[Place]:
        if len(names) == 1:
            yield Place(names[0])
            return
        start = 0
        for name in names:
            stop = start + self.shapes[name][0]
            yield Place(name, (start, stop))
            start = stop


def _root(name: str) -> str:
    """The text encoder that a module is in."""
    return name.partition(".")[0]


def flat(name: str) -> str:
    """A name as kohya's keys have it."""
    return name.replace(".", "_")


def _by_rule(path: str) -> str:
    """The flattened name of a parameter of a UNet in diffusers, from any of its names; any other as it is."""
    owner, _, leaf = path.rpartition(".")
    target = next(iter(resolve(owner) or ()), None)
    return flat(f"{target.name}.{leaf}") if target and not target.fused else path


def same_numbers(one: Shape, other: Shape) -> bool:
    """Whether two shapes are equal but for sides of 1."""
    return [side for side in one if side != 1] == [side for side in other if side != 1]


def slice_name(path: str, rows: Rows | None) -> str:
    """The canonical name of some rows of a weight: `layers.0.attention.qkv[0:64]`."""
    return f"{path}[{rows[0]}:{rows[1]}]" if rows else path


def finest_slices(height: int, named: Iterable[Rows]) -> list[Rows]:
    """The finest slices of a weight of `height` rows whose bounds are those of the `named` ones.

    Empty where these do not cover the weight exactly: then it is not known how its rows are divided.
    """
    slices = sorted({rows for rows in named if 0 <= rows[0] < rows[1] <= height})
    covered = 0
    for start, stop in slices:
        if start > covered:
            return []
        covered = max(covered, stop)
    if covered != height:
        return []
    bounds = sorted({bound for rows in slices for bound in rows})
    return list(pairwise(bounds))
