"""Merges of single entries: which are kept of each ΔW, and how those at one place become one (TIES, DARE, pruning).

Nothing here needs two whole ΔW at once: rows are formed in groups, and what comes of them is cut to a low rank.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from klora.errors import MismatchError
from klora.fusion.cut import cut
from klora.lora.deltas import Delta

GROUP = 64
"""Rows that are formed, and drawn for, at a time."""
SAMPLE = 1 << 16
"""Entries that tell about where a quantile of all lies."""


class Thinning(Protocol):
    """A rule that keeps some entries of each ΔW and makes the others zero."""

    def thin(self, side: int, group: int, rows: Tensor) -> Tensor:
        """What stays of the rows of group `group` (its first row is GROUP·group) of the delta number `side`."""


@dataclass(frozen=True)
class Largest:
    """Entries of at least a magnitude, one for each side."""

    thresholds: tuple[float, ...]

    @classmethod
    def of(cls, deltas: Sequence[Delta], density: float) -> Largest:
        """Keep the fraction `density` of largest entries of each ΔW, at least one; one ΔW is formed at a time."""
        return cls(tuple(_threshold(delta, density) for delta in deltas))

    def thin(self, side: int, group: int, rows: Tensor) -> Tensor:
        """Zero what is smaller."""
        return rows * (rows.abs() >= self.thresholds[side])


@dataclass(frozen=True)
class Drawn:
    """Entries drawn with probability `density`, divided by it; `seed` is any text."""

    seed: str
    density: float

    def thin(self, side: int, group: int, rows: Tensor) -> Tensor:
        """Drop at random, the same for the same seed, side and group; rescale the rest."""
        digest = hashlib.sha256(f"{self.seed}:{side}:{group}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        # All rows of a group are drawn for, so that a part of a delta is thinned as the whole is.
        drawn = torch.rand(GROUP, rows.shape[1], generator=generator, dtype=torch.float32, device="cpu")[: len(rows)]
        return rows * (drawn < self.density) / self.density


def elected_mean(values: Tensor) -> Tensor:
    """TIES' election and disjoint mean over the first axis: the mean of the non-zero values of the sum's sign."""
    agree = values * (values.sign() == values.sum(0).sign())
    return agree.sum(0) / (agree != 0).sum(0).clamp_min(1)


def largest(values: Tensor, density: float) -> float:
    """The magnitude that the fraction `density` of largest values reaches: the k-th largest |v|, k = density·n ≥ 1."""
    flat = values.flatten().abs()
    keep = max(1, round(density * flat.numel()))
    # A selection among all is slow.
    low, high = _around(flat, keep)
    between = flat[(flat >= low) & (flat <= high)]
    rank = keep - int((flat > high).sum())
    if 1 <= rank <= len(between):
        return float(between.kthvalue(len(between) - rank + 1).values)
    return float(flat.kthvalue(flat.numel() - keep + 1).values)


def _around(values: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Two of `values` (1-D) between which the `keep`-th largest all but surely lies, and few others, by a sample."""
    sample = values[:: max(1, len(values) // SAMPLE)].sort(descending=True).values
    place, margin = round(keep / len(values) * len(sample)), 4 * math.isqrt(len(sample))
    return sample[min(len(sample) - 1, place + margin)], sample[max(0, place - margin)]


@dataclass(eq=False)
class EntryMerge(Delta):
    """Entries that are kept of `sources`, times their strengths, summed or elected; `first` is its row 0 in these."""

    sources: tuple[Delta, ...]
    strengths: tuple[float, ...]
    thinning: Thinning
    elect: bool
    first: int = 0

    family = "merge of entries"

    def _fill(self, start: int, stop: int, block: Tensor) -> None:
        row = self.first + start
        end = self.first + stop
        while row < end:
            group = row // GROUP
            low, high = group * GROUP, min((group + 1) * GROUP, self.sources[0].shape[0])
            merged = self._group(group, low, high)
            until = min(end, high)
            block[row - self.first - start : until - self.first - start] = merged[row - low : until - low]
            row = until

    def _group(self, group: int, low: int, high: int) -> Tensor:
        sides = enumerate(zip(self.sources, self.strengths, strict=True))
        values = torch.stack(
            [self.thinning.thin(side, group, delta.rows(low, high)) * strength for side, (delta, strength) in sides]
        )
        return elected_mean(values) if self.elect else values.sum(0)

    def _part(self, start: int, stop: int, shape: tuple[int, ...]) -> EntryMerge:
        return replace(self, shape=shape, first=self.first + start)


def cut_merge(
    deltas: tuple[Delta, Delta], strengths: tuple[float, float], thinning: Thinning, elect: bool, rank: int | None
) -> Delta:
    """The merge of two deltas, cut to `rank` (None: the sum of both ranks; 0: not cut, and as large as the weight).

    Raises MismatchError for DoRA, whose entries depend on the weight it is applied to.
    """
    refuse_dora(deltas)
    first = deltas[0]
    merged = EntryMerge(first.file, first.key, first.rank, 1.0, 1.0, first.shape, deltas, strengths, thinning, elect)
    if rank == 0:
        return merged
    return cut(merged, sum(delta.rank for delta in deltas) if rank is None else rank).delta


def refuse_dora(deltas: Sequence[Delta]) -> None:
    """Raise MismatchError where one of `deltas` is a DoRA."""
    for delta in deltas:
        if delta.needs_base:
            raise MismatchError(
                f"{delta.file}: {delta.key}: is a DoRA, whose difference depends on the model's weight and cannot be"
                " merged without it; fuse with k-lora or direct while sampling, or use a file without DoRA"
            )


def _threshold(delta: Delta, density: float) -> float:
    # Whole first: a DoRA has no entries of its own to look at.
    refuse_dora((delta,))
    return largest(delta.matrix(), density)
