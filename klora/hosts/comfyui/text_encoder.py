"""The text encoders' parts of LoRAs, by ComfyUI's own patches of a CLIP."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from klora.hosts.text_tensors import host_tensors, text_keys
from klora.lora.deltas import Delta


def clip_with(clip: Any, deltas: Mapping[str, Delta], strength: float) -> tuple[Any, list[str]]:
    """A clone of a CLIP in which `deltas`, by canonical name, act, and the names of those that it does not have."""
    lora = importlib.import_module("comfy.lora")
    # A dictionary of our own: the host's default argument is shared between calls.
    known = lora.model_lora_keys_clip(clip.cond_stage_model, {})
    tensors, missing = {}, []
    for name, delta in deltas.items():
        keys = text_keys(name, known)
        if not keys:
            missing.append(name)
        tensors.update({f"{key}.{ending}": one for key in keys for ending, one in host_tensors(delta).items()})
    clip = clip.clone()
    clip.add_patches(lora.load_lora(tensors, known), strength)
    return clip, missing
