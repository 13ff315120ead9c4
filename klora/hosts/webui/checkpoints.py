"""What model checkpoint files of a WebUI are, and pairs are for, told without loading one."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from klora.pair import Pair

_LARGEST_HEADER = 64 * 2**20
_UNET = "model.diffusion_model."
# How trainers call it in a file's metadata.
_TRAINED_ON = {"sdxl": "SDXL", "xl-v1": "SDXL", "sd_v1": "SD1", "sd_v2": "SD2", "diffusion-v1": "SD1", "flux": "FLUX"}
_TEXT_WIDTHS = {768: "SD1", 1024: "SD2"}


def architecture_of(title: str) -> str | None:
    """SD1, SD2, SDXL or FLUX, of the checkpoint that the host lists under that title; None where that is not told."""
    models = importlib.import_module("modules.sd_models")
    found = models.get_closet_checkpoint_match(title)
    return None if found is None else _architecture(_shapes(Path(found.filename)))


def made_for(pair: Pair) -> str | None:
    """What a pair is for, by the names in its files, else by what their trainers wrote into them."""
    if pair.architecture:
        return pair.architecture
    for file in pair.loras:
        said = " ".join(file.metadata.get(key, "") for key in ("ss_base_model_version", "modelspec.architecture"))
        for word, name in _TRAINED_ON.items():
            if word in said.lower():
                return name
    return None


def two_models(pair: str, checkpoint: str) -> str:
    """Say that a pair is for one architecture and the checkpoint of another."""
    names = {"SD1": "SD 1", "SD2": "SD 2"}
    return (
        f"this pair is for {names.get(pair, pair)}, the checkpoint is {names.get(checkpoint, checkpoint)};"
        " choose another pair or another checkpoint"
    )


def _architecture(shapes: dict[str, list[int]]) -> str | None:
    if any("double_blocks.0.img_attn." in key for key in shapes):
        return "FLUX"
    if f"{_UNET}label_emb.0.0.weight" in shapes:
        return "SDXL"
    context = shapes.get(f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    return _TEXT_WIDTHS.get(context[-1]) if context else None


def _shapes(path: Path) -> dict[str, list[int]]:
    """The tensors' shapes by name; none where the file is no safetensors file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= _LARGEST_HEADER else {}
        return {key: [*map(int, entry["shape"])] for key, entry in header.items() if key != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
