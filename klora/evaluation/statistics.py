"""Means over pictures with paired bootstrap intervals, and the harmonic mean of several scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES, LEVEL, SEED = 10_000, 0.95, 0
_AT_ONCE = 256

Array = NDArray[np.float64]


class Estimate(NamedTuple):
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float


def harmonic_mean(values: Array) -> Array:
    """n / Σ 1/x over the last axis; 0 where one of them is 0 or less, as its limit is."""
    values = np.asarray(values, dtype=np.float64)
    positive = np.asarray(np.all(values > 0, axis=-1, keepdims=True))
    safe = np.where(positive, values, 1.0)
    return np.where(positive[..., 0], values.shape[-1] / (1 / safe).sum(axis=-1), 0.0)


def resampled_means(values: Array, resamples: int = RESAMPLES, seed: int = SEED) -> Array:
    """Draw the units (axis 1) of `values` (methods, units, metrics) anew, with replacement, and give their means.

    Every draw takes the same units for all methods: the bootstrap is paired (Efron & Tibshirani 1993, chapter 6).
    Gives (resamples, methods, metrics).
    """
    units = values.shape[1]
    draw = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, _AT_ONCE):
        chosen = draw.integers(units, size=(min(_AT_ONCE, resamples - start), units))
        counts = np.stack([np.bincount(row, minlength=units) for row in chosen])
        means.append(np.einsum("ru,muk->rmk", counts, values) / units)
    return np.concatenate(means)


def estimates(
    values: Array, statistic: Callable[[Array], Array], resamples: int = RESAMPLES, seed: int = SEED
) -> list[list[Estimate]]:
    """`statistic` of the means of `values` (methods, units, metrics), with percentile intervals.

    `statistic` takes means (…, methods, metrics) and gives (…, rows, columns), as what is returned.
    """
    whole = statistic(values.mean(axis=1))
    drawn = statistic(resampled_means(values, resamples, seed))
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(drawn, (tail, 100 - tail), axis=0)
    cells = np.stack([whole, low, high], axis=-1)
    return [[Estimate(*map(float, cell)) for cell in row] for row in cells]
