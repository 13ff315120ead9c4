"""The LoRA files that ComfyUI lists."""

from __future__ import annotations

import importlib
from pathlib import Path

from klora.errors import KloraError


def listed_loras() -> list[str]:
    """The names of the files, with their folders, as ComfyUI's own menus have them."""
    names: list[str] = importlib.import_module("folder_paths").get_filename_list("loras")
    return names


def lora_path(name: str) -> Path:
    """The file of that name; KloraError where there is none."""
    path = importlib.import_module("folder_paths").get_full_path("loras", name)
    if path is None:
        raise KloraError(f"there is no LoRA named {name!r} in ComfyUI's folder of LoRAs; choose one of the list")
    return Path(path)
