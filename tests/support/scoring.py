"""Scores of whole files, without a cache."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from klora.fusion.scores import FileScores, score_deltas, standard_ks
from klora.lora.file import LoraFile


def score_all(file: LoraFile, wanted: Mapping[str, Collection[int]] | None = None) -> FileScores:
    """Every diffusion-model module of a file, at the standard K and at those wanted by module name."""
    wanted = wanted or {}
    return score_deltas(
        {name: (delta, {*standard_ks(delta.rank), *wanted.get(name, ())}) for name, delta in file.modules.items()}
    )
