"""The names of a model at hand: under which spellings a file may mean which of its weights.

Works for any architecture, since nothing is looked up but what the model itself, or its host, says of its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from klora.lora.names import resolve, spellings

Rows = tuple[int, int]
Shape = tuple[int, ...]


class Place(NamedTuple):
    """A module that a file's weight acts in, and which rows [start, stop) of that weight do; None: all of them."""

    name: str
    rows: Rows | None = None


class ModelIndex:
    """Looks a file's keys up in a model whose weights have these `shapes`, by canonical name.

    `aliases` are other spellings of the host's own, each of one or several of those names, in the order of the rows.
    `architecture` is SD1, SD2, SDXL, FLUX, or None for any other.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        aliases: Mapping[str, Sequence[str]] | None = None,
        architecture: str | None = None,
    ) -> None:
        self.shapes = shapes
        self.architecture = architecture
        self._names = {flat(alias): tuple(names) for alias, names in (aliases or {}).items()}
        self._names |= {flat(name): (name,) for name in shapes}

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
