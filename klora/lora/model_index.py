"""The names of a model at hand: under which spellings a file may mean which of its weights.

Works for any architecture, since nothing is looked up but what the model itself, or its host, says of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from klora.lora.names import Kind, bare, kind_of, resolve, spellings
from klora.lora.renames import renamed
from klora.lora.text_names import t5_path

Rows = tuple[int, int]
Shape = tuple[int, ...]


class Place(NamedTuple):
    """A module that a file's weight acts in, and which rows [start, stop) of that weight do; None: all of them."""

    name: str
    rows: Rows | None = None


class ModelIndex:
    """Looks a file's keys up in a model whose weights have these `shapes`, by canonical name.

    `aliases` are other spellings of the host's own, each of one or several of those names, in the order of the rows.
    `architecture` is SD1, SD2, SDXL, FLUX, or None for any other. `translate` says where the weights of a whole file
    act that is written in names of others still. `text_encoder` are the names of the text encoders' modules.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        aliases: Mapping[str, Sequence[str]] | None = None,
        architecture: str | None = None,
        translate: Callable[[Mapping[str, Shape]], Mapping[str, tuple[Place, ...]]] | None = None,
        text_encoder: Iterable[str] = (),
    ) -> None:
        self.shapes = shapes
        self.architecture = architecture
        self._translate = translate
        self._t5 = {path: name for name in text_encoder if (path := t5_path(name))}
        # A host may have a name under one prefix alone, such as "transformer.", and a file under another.
        known = {bare(alias): tuple(names) for alias, names in (aliases or {}).items()}
        known |= {name: (name,) for name in shapes}
        self._names = {flat(other): names for name, names in known.items() for other in renamed(name)}
        self._names |= {flat(name): names for name, names in known.items()}
        self._attention = {
            names[0] for alias, names in (aliases or {}).items() if len(names) == 1 and kind_of(alias) == "attention"
        }

    def locate(self, file: Mapping[str, Shape]) -> dict[str, tuple[Place, ...]]:
        """Where the weights of a file, whose shapes go by its own prefixes, act; without what the model does not have.

        Raises ValueError where a weight is fused and cannot be split into the parts that the model has.
        """
        found = {prefix: places for prefix, shape in file.items() if (places := self.find(prefix, shape))}
        if self._translate and len(found) < len(file):
            found = {**self._translate(file), **found}
        return found

    def find(self, prefix: str, shape: Shape) -> tuple[Place, ...] | None:
        """Where a weight of `shape` under a file's own key prefix acts; None where the model has no such module.

        The model's own names and its host's come first, then the tables by rule. Raises ValueError where the weight
        is fused and cannot be split into the parts that the model has.
        """
        for spelling in spellings(prefix):
            if names := self._names.get(spelling):
                return tuple(self._split(names))
        targets = resolve(prefix) or ()
        if not targets or any(target.name not in self.shapes for target in targets):
            return None
        return tuple(Place(target.name, target.rows(*shape[:2]) if target.fused else None) for target in targets)

    def text_name(self, name: str) -> str:
        """A text encoder's module by the model's own count: the T5 is the first, second or third of its encoders."""
        return self._t5.get(t5_path(name), name)

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


def flat(name: str) -> str:
    """A name as kohya's keys have it."""
    return name.replace(".", "_")


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
