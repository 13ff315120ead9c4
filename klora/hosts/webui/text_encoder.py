"""The text-encoder part of a LoRA, as a WebUI's own LoRA code takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from klora.errors import MismatchError
from klora.hosts.webui.lora_library import ListedLora
from klora.lora.deltas import Delta
from klora.lora.deltas.dora import DoraDelta


@dataclass(frozen=True)
class TextPart:
    """The text-encoder part of one file: `deltas` by canonical name, applied with `strength`."""

    lora: ListedLora
    deltas: Mapping[str, Delta]
    strength: float
    sha256: str


def kohya_text_key(name: str, several: bool) -> str:
    """Spell a text-encoder module as kohya does, for a model with one text encoder or with several."""
    component, _, path = name.partition(".")
    number = {"text_encoder": "1" if several else "", "text_encoder_2": "2"}[component]
    return f"lora_te{number}_{path.replace('.', '_')}"


def host_tensors(delta: Delta) -> dict[str, Tensor]:
    """A delta under the key endings that every WebUI reads: as factors where it has them, else as a whole.

    Raises MismatchError for a DoRA of another family than LoRA.
    """
    direction = delta.direction if isinstance(delta, DoraDelta) else delta
    factors = direction.factors()
    if factors is None:
        if delta.needs_base:
            raise MismatchError(
                f"{delta.file}: {delta.key}: this kind of DoRA cannot be applied to a text encoder here;"
                " set the text encoder to none, or use another file"
            )
        return {"diff": delta.matrix()}
    tensors = {
        "lora_up.weight": factors.up.float(),
        "lora_down.weight": factors.down.float(),
        "alpha": torch.tensor(delta.scale * delta.rank),
    }
    if isinstance(delta, DoraDelta):
        shape = (1, -1) if delta.by_column else (-1, 1)
        tensors["dora_scale"] = delta.magnitude.fp32().reshape(shape)
    return tensors
