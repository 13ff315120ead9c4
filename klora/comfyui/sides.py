"""The LoRAs of a fusion's sides, as nodes are given them."""

from __future__ import annotations

import importlib
from pathlib import Path

from klora.cache import ScoreCache
from klora.pair import PAIRS, Pair

FOLDER = "__klora"
"""Where scores lie in ComfyUI's user folder; underscores begin the names of what it serves to no page."""


def open_pair(subject: Path, style: Path) -> Pair:
    """Open the files of both sides, or give them as they were opened before."""
    users = importlib.import_module("folder_paths").get_user_directory()
    return PAIRS.open(subject, style, ScoreCache(Path(users) / FOLDER))
