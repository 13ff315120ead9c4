"""Scores of a LoRA file: exact sums of the K largest |ΔW|, without ever holding ΔW (K-LoRA, Eq. 1-4 and 9)."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from klora.errors import LoraValueError
from klora.fusion.threads import single_threaded_pool
from klora.late import np, torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from klora.lora.deltas import Delta

    Floats = NDArray[np.float32]

Wanted = Mapping[str, "tuple[Delta, Collection[int]]"]
"""Modules to be scored: their deltas and K's by name."""
OnScored = Callable[[int, int], None]
"""Is called with how many modules have been scored, and of how many."""

SCORING_VERSION = 2
PARTNER_RANKS = tuple(2**i for i in range(8))
"""The ranks, 1 to 128, of the LoRAs that a file may be fused with next without being scored again."""

BLOCK_ENTRIES = 2**20
SAMPLE_ENTRIES = 2**12
# The threshold aims at more than K survivors, the more so the less of the module the sample has seen; should there be
# fewer after all, the module is read again with a lower threshold, at last with none.
MARGINS = (1.1, 4.4, math.inf)
SUM_WIDTH = 128
MANY_ROWS = 2048


@dataclass(frozen=True)
class ModuleScore:
    """What K-LoRA needs to know of one module's delta, scale = alpha / rank included.

    `l1` is Σ|ΔW| (Eq. 9), `fro2` is ‖ΔW‖_F², `sums[K]` is the sum of the K largest |entries| (Eq. 1-4), where a K
    beyond the number of entries counts as all of them.
    """

    shape: tuple[int, ...]
    rank: int
    alpha: float
    l1: float
    fro2: float
    sums: dict[int, float]

    def top_k(self, k: int) -> float | None:
        """Sum of the `k` largest |entries|, or None when it has not been computed for that `k`."""
        return self.l1 if k >= math.prod(self.shape) else self.sums.get(k)

    def times(self, weight: float) -> ModuleScore:
        """The score of weight·ΔW; the score itself for a weight of 1."""
        if weight == 1:
            return self
        size = abs(weight)
        sums = {k: value * size for k, value in self.sums.items()}
        return replace(self, alpha=self.alpha * weight, l1=self.l1 * size, fro2=self.fro2 * weight**2, sums=sums)


FileScores = dict[str, ModuleScore]


def standard_ks(rank: int) -> tuple[int, ...]:
    """The K = r_c·r_s (Eq. 5) of a module of this rank with partners of the usual ranks."""
    return tuple(rank * partner for partner in PARTNER_RANKS)


class Workspace:
    """The buffers of one block, reused from block to block and from module to module."""

    def __init__(self) -> None:
        self.block = torch.zeros(0, dtype=torch.float32, device="cpu")
        self.above = np.zeros(0, dtype=np.bool_)

    def reserve(self, entries: int) -> None:
        """Make room for a block of `entries`."""
        if self.block.numel() < entries:
            size = _padded(entries)
            self.block = torch.zeros(size, dtype=torch.float32, device="cpu")
            self.above = np.zeros(size, dtype=np.bool_)


def score_delta(delta: Delta, ks: Iterable[int], workspace: Workspace | None = None) -> ModuleScore:
    """Score one module exactly, block of rows by block of rows (about a million entries each).

    Entries are fp32 and sums fp64 (the L1 and Frobenius sums of large modules to about 1e-8); ties do not matter. The
    result does not depend on the number of threads, as far as the matrix product does not. `workspace` lends its
    buffers; needed are some 5 MB for it and some 20 MB per million of the largest K.

    Raises `LoraValueError`, naming file and tensor key, when an entry is NaN or infinite; `ValueError` for a K < 1.
    """
    workspace = workspace or Workspace()
    wanted = sorted(set(ks))
    if wanted and wanted[0] < 1:
        raise ValueError(f"K must be at least 1, not {wanted[0]}")
    entries = math.prod(delta.shape)
    inner = [k for k in wanted if k < entries]
    k_max = inner[-1] if inner else 0
    with delta.loaded():
        for margin in MARGINS:
            l1, fro2, largest, enough = _read(delta, k_max, margin, workspace)
            if enough:
                break
    sums = dict(zip(inner, top_k_sums(largest, inner), strict=True))
    # The whole, whose sum is rounded more, is never less than its part.
    l1 = max([l1, *sums.values()])
    sums.update((k, l1) for k in wanted if k >= entries)
    return ModuleScore(tuple(delta.shape), delta.rank, float(delta.alpha), l1, fro2, sums)


def score_deltas(wanted: Wanted, on_scored: OnScored | None = None) -> FileScores:
    """Score several modules on all of torch's threads (at most `klora.fusion.threads.MAX_WORKERS`).

    Raises `LoraValueError` for the first bad module.
    """
    if not wanted:
        return {}
    # One thread per module: each block stays in one core's cache, and no step waits for the other threads. Measured on
    # 2 cores, this is 1.7 times as fast as letting torch share out every step, and a busy machine loses far less.
    workspaces = threading.local()

    def score(delta: Delta, ks: Collection[int]) -> ModuleScore:
        if not hasattr(workspaces, "own"):
            workspaces.own = Workspace()
        return score_delta(delta, ks, workspaces.own)

    scores: FileScores = {}
    with single_threaded_pool(len(wanted)) as pool:
        for name, found in zip(wanted, pool.map(score, *zip(*wanted.values(), strict=True)), strict=True):
            scores[name] = found
            if on_scored:
                on_scored(len(scores), len(wanted))
    return scores


def overflow(delta: Delta) -> LoraValueError:
    """Why the sums of a delta are not finite; raises LoraValueError itself where that is a tensor's fault."""
    delta.check_finite()
    return LoraValueError(
        delta.file, "its product is too large for 32-bit floats", "train or export the file again", delta.key
    )


def top_k_sums(values: Floats, ks: list[int]) -> list[float]:
    """Sum of the k largest of `values` (1-D, ≥ 0) for every k in `ks`; missing values count as zeros.

    The bits of non-negative floats order as the floats do, so their leading bits are buckets in order. A bucket lies
    wholly inside or outside the k largest, except the one that holds the k-th: only those few are sorted.
    """
    if not ks or not values.size:
        return [0.0] * len(ks)
    bucket = values.view(np.int32) >> 14
    bucket = bucket.max() - bucket
    # torch counts faster than numpy, and sums in the precision of the weights.
    size = torch.bincount(torch.from_numpy(bucket)).numpy()
    count = np.cumsum(size)
    weights = torch.from_numpy(values).double()
    total = torch.bincount(torch.from_numpy(bucket), weights=weights).numpy().cumsum()
    k = np.minimum(ks, values.size)
    at = np.searchsorted(count, k)
    split = np.zeros(len(size), dtype=bool)
    split[at] = True
    ordered = np.sort(values[split.take(bucket)])[::-1]
    prefix = np.concatenate(([0.0], np.cumsum(ordered, dtype=np.float64)))
    start = np.cumsum(np.where(split, size, 0))[at] - size[at]
    inside = k - (count[at] - size[at])
    before = np.where(at > 0, total[at - 1], 0.0)
    sums: list[float] = (before + (prefix[start + inside] - prefix[start])).tolist()
    return sums


def _read(delta: Delta, k: int, margin: float, workspace: Workspace) -> tuple[float, float, Floats, bool]:
    """One pass over ΔW: Σ|ΔW|, ‖ΔW‖_F², its largest |entries|, and whether the k largest are surely among them."""
    rows, columns = delta.shape[0], math.prod(delta.shape[1:])
    step = max(1, BLOCK_ENTRIES // columns)
    workspace.reserve(min(step, rows) * columns)
    l1 = fro2 = threshold = 0.0
    kept: list[Floats] = []
    count = 0
    for start in range(0, rows, step):
        block = _absolute_rows(delta, start, min(start + step, rows), workspace)
        block_l1, block_fro2 = _norms(block.numel(), workspace)
        if not (math.isfinite(block_l1) and math.isfinite(block_fro2)):
            raise overflow(delta)
        l1, fro2 = l1 + block_l1, fro2 + block_fro2
        if start == 0:
            share = block.numel() / (rows * columns)
            threshold = _sample_quantile(block, margin / math.sqrt(share) * k / (rows * columns))
        kept.append(_above(block.numel(), threshold, workspace))
        count += kept[-1].size
        if count > 2 * k:
            kept = [_largest(np.concatenate(kept), k)]
            count, threshold = k, float(kept[0].min()) if k else math.inf
    # Above a threshold of 0 only zeros are missing, and they add nothing.
    return l1, fro2, np.concatenate(kept), count >= k or threshold == 0


def _absolute_rows(delta: Delta, start: int, stop: int, workspace: Workspace) -> Tensor:
    """|ΔW[start:stop]|, flat, in the workspace."""
    columns = math.prod(delta.shape[1:])
    entries = (stop - start) * columns
    block = workspace.block[:entries]
    workspace.block[entries : _padded(entries)] = 0
    rows = delta.rows(start, stop, out=block.view(stop - start, columns))
    return torch.abs(rows.reshape(-1), out=block)


def _norms(entries: int, workspace: Workspace) -> tuple[float, float]:
    """Σx and Σx² of the block in the workspace.

    Each row of a fixed width is summed by one thread, so the result is the same for any number of them. Rows are summed
    in fp32 where they are so many that their rounding averages out (to some 1e-8), in fp64 where they are few.
    """
    rows = workspace.block[: _padded(entries)].view(-1, SUM_WIDTH)
    rows = rows.double() if len(rows) < MANY_ROWS else rows
    l1 = rows.sum(1).double().sum()
    fro2 = torch.linalg.vector_norm(rows, dim=1).double().square().sum()
    return float(l1), float(fro2)


def _largest(values: Floats, k: int) -> Floats:
    """The k largest of `values`."""
    return torch.from_numpy(values).topk(k, sorted=False).values.numpy()


def _sample_quantile(block: Tensor, fraction: float) -> float:
    """A value that about `fraction` of the block exceeds, from a strided sample; 0 when that is most of it."""
    # An odd stride visits every column, where widths are multiples of powers of two.
    sample = block[:: max(1, block.numel() // SAMPLE_ENTRIES) | 1]
    if fraction >= 0.5 or sample.numel() < 2:
        return 0.0
    return float(sample.kthvalue(sample.numel() - math.ceil(fraction * sample.numel())).values)


def _above(entries: int, threshold: float, workspace: Workspace) -> Floats:
    """The entries of the block in the workspace that are greater than `threshold` (≥ 0), in no particular order.

    A gather that branches on each of few, scattered entries would cost more than the matrix product. Eight neighbours,
    whose eight bytes are one integer, are passed over together; those with any survivor are few enough to be looked at
    twice.
    """
    width = _padded(entries)
    values = workspace.block[:width].numpy()
    above = np.greater(values, np.float32(threshold), out=workspace.above[:width])
    groups = np.flatnonzero(above.view(np.uint64) != 0)
    likely = values.reshape(-1, 8).take(groups, axis=0).ravel()
    return likely.take(np.flatnonzero(likely > threshold))


def _padded(entries: int) -> int:
    """`entries` rounded up to whole rows of `SUM_WIDTH`; the workspace holds zeros in between."""
    return math.ceil(entries / SUM_WIDTH) * SUM_WIDTH
