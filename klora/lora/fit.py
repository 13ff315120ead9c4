"""Deltas brought into the shape of the layer that they act in, where the file alone does not tell it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from klora.lora.deltas import Delta, FileDelta, WideDelta
from klora.lora.model_index import Place, Shape
from klora.lora.names import is_input

Places = Mapping[str, tuple[Place, ...]]
"""Of each delta of a file, by its own prefix, the modules that it acts in."""


def fitted(deltas: Mapping[str, Delta], places: Places, shapes: Mapping[str, Shape]) -> dict[str, tuple[Place, ...]]:
    """The same places, with the shapes of the layers there where a delta has another one and fits."""
    return {
        prefix: tuple(_fitted(deltas[prefix], place, shapes) for place in found) for prefix, found in places.items()
    }


def telling_shapes(files: Iterable[Mapping[str, Delta]]) -> dict[str, Shape]:
    """Of each module the shape that tells most of its layer: a kernel's rather than flat, wide rather than narrow."""
    found: dict[str, Shape] = {}
    for modules in files:
        for name, delta in modules.items():
            found[name] = max(found.get(name, ()), delta.shape, key=lambda shape: (len(shape), math.prod(shape)))
    return found


def at_place(delta: FileDelta, place: Place) -> FileDelta:
    """What of a delta acts at a place, in the shape of the layer there."""
    part = delta.part(*place.rows) if place.rows else delta
    if place.shape is None:
        return part
    own = _unflattened(part.shape, place.shape)
    part = part if own == part.shape else part.shaped(own)
    return part if own == place.shape else WideDelta.of(part, place.shape)


def _fitted(delta: Delta, place: Place, shapes: Mapping[str, Shape]) -> Place:
    rows = place.rows[1] - place.rows[0] if place.rows else delta.shape[0]
    own, layer = (rows, *delta.shape[1:]), shapes.get(place.name)
    if layer is None or own == layer:
        return place
    with_kernel = _unflattened(own, layer)
    narrower = is_input(place.name) and (own[0], with_kernel[2:]) == (layer[0], layer[2:]) and with_kernel[1] < layer[1]
    return place._replace(shape=layer) if narrower or with_kernel == layer else place


def _unflattened(own: Shape, layer: Shape) -> Shape:
    """A shape (out, in·kernel) with the kernel of a layer (out, in, *kernel), where that divides it; else as it is."""
    area = math.prod(layer[2:])
    return (own[0], own[1] // area, *layer[2:]) if len(own) == 2 < len(layer) and own[1] % area == 0 else own
