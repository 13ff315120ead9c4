"""The text-encoder part of a LoRA, under keys and in forms that the LoRA code of other programs reads."""

from __future__ import annotations

import torch
from torch import Tensor

from klora.errors import MismatchError
from klora.lora.deltas import Delta
from klora.lora.deltas.dora import DoraDelta
from klora.lora.text_names import t5_path


def kohya_text_key(name: str, several: bool) -> str:
    """Spell a text-encoder module as kohya does, for a model with one text encoder or with several."""
    component, _, path = name.partition(".")
    number = {"text_encoder": "1" if several else "", "text_encoder_2": "2"}[component]
    return f"lora_te{number}_{path.replace('.', '_')}"


def text_keys(name: str) -> list[str]:
    """The keys of a module in Forge's and ComfyUI's maps; they number the T5 by its place among the encoders."""
    path = t5_path(name).replace(".", "_")
    return [f"lora_te{number}_{path}" for number in (1, 2, 3)] if path else [kohya_text_key(name, several=True)]


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
        "alpha": torch.tensor(delta.scale * delta.rank, dtype=torch.float32, device="cpu"),
    }
    if isinstance(delta, DoraDelta):
        shape = (1, -1) if delta.by_column else (-1, 1)
        tensors["dora_scale"] = delta.magnitude.fp32().reshape(shape)
    return tensors
