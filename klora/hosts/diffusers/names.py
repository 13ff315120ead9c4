"""What a diffusers pipeline itself makes of names that trainers write and its model does not have.

Its loader is given tensors that tell where they went: each module's factors of rank 1, `down` filled with the module's
number and `up` with the numbers of its rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from klora.lora.model_index import Place, Shape

ROOT = "transformer."
Translate = Callable[[Mapping[str, Shape]], dict[str, tuple[Place, ...]]]


def translator(pipe: Any, shapes: Mapping[str, Shape]) -> Translate:
    """From the shapes of a file's weights by its own prefixes to the places that the pipeline's loader gives them.

    `shapes` are those of the model's weights. What the loader does not translate, or stores in another order of rows,
    is left out.
    """

    def translate(file: Mapping[str, Shape]) -> dict[str, tuple[Place, ...]]:
        prefixes = list(file)
        places: dict[str, list[Place]] = {}
        for name, down, up in _loaded(pipe, _tracers(file)):
            place = Place(name, _rows(up))
            if place.rows and name in shapes and shapes[name] == (place.rows[1] - place.rows[0], *down.shape[1:]):
                places.setdefault(prefixes[round(down.flatten()[0].item())], []).append(place)
        return {
            prefix: tuple(sorted(found, key=lambda place: place.rows or (0, 0)))
            for prefix, found in places.items()
            if sum(stop - start for place in found for start, stop in filter(None, [place.rows])) == file[prefix][0]
        }

    return translate


def _tracers(file: Mapping[str, Shape]) -> dict[str, Tensor]:
    tensors = {}
    for number, (prefix, shape) in enumerate(file.items()):
        dotted = "." in prefix
        down, up = ("lora_A", "lora_B") if dotted else ("lora_down", "lora_up")
        tensors[f"{prefix}.{down}.weight"] = torch.full(
            (1, *shape[1:]), float(number), dtype=torch.float32, device="cpu"
        )
        tensors[f"{prefix}.{up}.weight"] = torch.arange(shape[0], dtype=torch.float32, device="cpu")[:, None]
        if not dotted:
            tensors[f"{prefix}.alpha"] = torch.tensor(1.0, dtype=torch.float32, device="cpu")
    return tensors


def _loaded(pipe: Any, tensors: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """(name, down, up) of what the pipeline's loader makes of tensors; nothing where it makes nothing of them."""
    load = getattr(type(pipe), "lora_state_dict", None)
    if load is None:
        return []
    try:
        loaded: dict[str, Tensor] = load(tensors)
    except Exception as error:
        # It takes whole files of the kinds that it knows, and fails on all others in ways of its own.
        logging.getLogger("klora").debug("%s does not translate this file: %r", type(pipe).__name__, error)
        return []
    downs = {key.removesuffix(".lora_A.weight"): down for key, down in loaded.items() if key.endswith(".lora_A.weight")}
    return [
        (key.removeprefix(ROOT), down, loaded[f"{key}.lora_B.weight"])
        for key, down in downs.items()
        if f"{key}.lora_B.weight" in loaded
    ]


def _rows(up: Tensor) -> tuple[int, int] | None:
    """The rows that numbered rows are, where they are one after another."""
    numbers = up.flatten()
    start = round(numbers[0].item())
    stop = start + len(numbers)
    return (
        (start, stop)
        if torch.equal(numbers, torch.arange(start, stop, dtype=numbers.dtype, device=numbers.device))
        else None
    )
