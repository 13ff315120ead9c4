"""Rows of a batch, in all that a call of a denoiser is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from klora.engine.dynamic import BatchRows


def rows_of(value: Any, rows: BatchRows | None) -> Any:
    """The same rows of all tensors of a batch, also those in dictionaries, lists and tuples; all of them for None."""
    if rows is None:
        return value
    if isinstance(value, Mapping):
        return {key: rows_of(part, rows) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(rows_of(part, rows) for part in value)
    if isinstance(value, Tensor) and value.ndim and len(value) == rows.of:
        return value[rows.start : rows.stop]
    return value
