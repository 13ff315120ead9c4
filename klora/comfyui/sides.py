"""The LoRAs of a fusion's sides, as nodes are given them."""

from __future__ import annotations

import importlib
from pathlib import Path

from klora.cache import ScoreCache
from klora.hosts.comfyui.loras import lora_path
from klora.lora.disk import identity
from klora.pair import PAIRS, Pair

FOLDER = "__klora"
"""Where scores lie in ComfyUI's user folder; underscores begin the names of what it serves to no page."""
Listed = tuple[tuple[str, float], ...]
"""LoRAs by the names that ComfyUI lists, each with its weight in the sum: what goes from node to node as a side."""
SideFiles = tuple[tuple[Path, float], ...]


def find_side(name: str, more: Listed = ()) -> SideFiles:
    """The files of a side, which are the one of a node's own menu and `more`; KloraError for a name that is none's."""
    return tuple((lora_path(one), weight) for one, weight in ((name, 1.0), *more))


def open_pair(subject: SideFiles, style: SideFiles) -> Pair:
    """Open the files of both sides, or give them as they were opened before."""
    users = importlib.import_module("folder_paths").get_user_directory()
    return PAIRS.open(subject, style, ScoreCache(Path(users) / FOLDER))


def state_of(*names: str) -> str:
    """What changes when one of the listed files is replaced, or comes or goes."""
    found = []
    for name in names:
        try:
            found.append(repr(identity(lora_path(name))))
        except Exception as error:  # The node itself says what is wrong with the file.
            found.append(type(error).__name__)
    return "; ".join(found)
