"""The extension's page in the host's settings."""

from __future__ import annotations

import importlib
from pathlib import Path

from klora.cache import ScoreCache


def score_cache() -> ScoreCache:
    """Give the cache of scores in the folder, and of the size, that the settings say."""
    shared, paths = importlib.import_module("modules.shared"), importlib.import_module("modules.paths")
    folder = getattr(shared.opts, "klora_cache_folder", "") or Path(paths.data_path) / "cache" / NAME
    megabytes = getattr(shared.opts, "klora_cache_megabytes", 256)
    return ScoreCache(folder, int(megabytes) * 2**20)


NAME = "klora"
