"""The text-encoder part of a LoRA, under keys and in forms that the LoRA code of other programs reads."""

from __future__ import annotations

from collections.abc import Container

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


def text_keys(name: str, known: Container[str]) -> list[str]:
    """Those keys of a module that Forge's or ComfyUI's map has, which is `known`.

    They number the T5 by its place among the encoders, and a lone CLIP not at all.
    """
    path = t5_path(name).replace(".", "_")
    if path:
        return [key for number in (1, 2, 3) if (key := f"lora_te{number}_{path}") in known]
    own = kohya_text_key(name, several=True)
    if own in known:
        return [own]
    # Without the first CLIP the second, SDXL's refiner's, is the only one.
    first, lone = (kohya_text_key(f"text_encoder.{name.partition('.')[2]}", several) for several in (True, False))
    return [lone] if lone in known and first not in known else []


def host_tensors(delta: Delta) -> dict[str, Tensor]:
    """A delta under the key endings that every WebUI reads: as factors where it has them; else, or with a bias, whole.

    Raises MismatchError for a DoRA of another family than LoRA.
    """
    direction = delta.direction if isinstance(delta, DoraDelta) else delta
    factors = direction.factors()
    bias = {"diff_b": delta.bias.change()} if delta.bias else {}
    if factors is None or (bias and not delta.needs_base):
        if delta.needs_base:
            raise MismatchError(
                f"{delta.file}: {delta.key}: this kind of DoRA cannot be applied to a text encoder here;"
                " set the text encoder to none, or use another file"
            )
        return {"diff": delta.matrix(), **bias}
    tensors = {
        "lora_up.weight": factors.up.float(),
        "lora_down.weight": factors.down.float(),
        "alpha": torch.tensor(delta.scale * delta.rank, dtype=torch.float32, device="cpu"),
    }
    if isinstance(delta, DoraDelta):
        shape = (1, -1) if delta.by_column else (-1, 1)
        tensors["dora_scale"] = delta.magnitude.fp32().reshape(shape)
    return {**tensors, **bias}
