"""The scores of low-rank deltas on an accelerator: a few large operations for many modules at once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from klora.fusion.scores import FileScores, ModuleScore, OnScored, Wanted, overflow
from klora.late import torch
from klora.lora.deltas import Delta

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_ENTRIES = 2**24
"""Of ΔW at once: with what is made of it in between, less than 256 MB."""


def scores_on(device: torch.device) -> bool:
    """Whether scores are computed there rather than on the CPU."""
    return device.type == "cuda"


def is_low_rank(delta: Delta) -> bool:
    """Whether ΔW is one product of two matrices."""
    factors = delta.factors()
    return factors is not None and factors.mid is None


def score_low_rank(wanted: Wanted, device: torch.device, on_scored: OnScored | None = None) -> FileScores:
    """The scores of deltas that are one product of two matrices, computed on `device`; LoraValueError as on the CPU.

    Entries are fp32 and sums fp64. Modules of one shape and rank are multiplied together, as many as fit in a chunk.
    """
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, (delta, _) in wanted.items():
        groups[tuple(delta.shape), delta.rank].append(name)
    scores: FileScores = {}
    with torch.no_grad(), full_precision():
        for (shape, _), names in groups.items():
            many = max(1, CHUNK_ENTRIES // math.prod(shape))
            for start in range(0, len(names), many):
                batch = {name: wanted[name] for name in names[start : start + many]}
                scores |= _score_batch(batch, device)
                if on_scored:
                    on_scored(len(scores), len(wanted))
    return {name: scores[name] for name in wanted}


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply fp32 matrices in fp32, also where the host allows TF32 for the model."""
    backend = torch.backends.cuda.matmul
    # The newer of the two switches must not be mixed with the older one.
    switch, exact = ("fp32_precision", "ieee") if hasattr(backend, "fp32_precision") else ("allow_tf32", False)
    before = getattr(backend, switch)
    setattr(backend, switch, exact)
    try:
        yield
    finally:
        setattr(backend, switch, before)


def _score_batch(batch: Wanted, device: torch.device) -> FileScores:
    """The scores of modules of one shape and rank."""
    deltas = [delta for delta, _ in batch.values()]
    shape, entries = tuple(deltas[0].shape), math.prod(deltas[0].shape)
    ks = sorted({min(k, entries) for _, wanted in batch.values() for k in wanted})
    up, down = _factors(deltas, device)
    rows, columns = shape[0], entries // shape[0]
    step = max(1, CHUNK_ENTRIES // (len(deltas) * columns))
    norms, largest = torch.zeros(len(deltas), 2, dtype=torch.float64, device=device), up.new_zeros(len(deltas), 0)
    for start in range(0, rows, step):
        block = torch.bmm(up[:, start : start + step], down).flatten(1).abs_()
        l1 = block.sum(1, dtype=torch.float64)
        fro2 = torch.linalg.vector_norm(block.view(-1, columns), dim=1).double().square().view(len(deltas), -1).sum(1)
        norms += torch.stack([l1, fro2], 1)
        largest = torch.cat([largest, _largest(block, ks[-1])], 1)
        if start:
            largest = _largest(largest, ks[-1])
    prefix = largest.sort(1, descending=True).values.cumsum(1, dtype=torch.float64)
    at = torch.tensor([k - 1 for k in ks], device=device)
    # One transfer, and so one wait, for all of them.
    table = torch.cat([norms, prefix[:, at]], 1).tolist()
    return {
        name: _score(*batch[name], l1, fro2, dict(zip(ks, sums, strict=True)))
        for name, (l1, fro2, *sums) in zip(batch, table, strict=True)
    }


def _factors(deltas: list[Delta], device: torch.device) -> tuple[Tensor, Tensor]:
    """(n, out, r) and (n, r, in·kh·kw), fp32, the scale in the first."""
    factors = [found for delta in deltas if (found := delta.factors())]
    scales = torch.tensor([delta.scale for delta in deltas], dtype=torch.float32, device=device)
    # One transfer each, in the file's precision, rather than one for every module.
    up = torch.stack([found.up for found in factors]).to(device).float()
    down = torch.stack([found.down.flatten(1) for found in factors]).to(device).float()
    return up.mul_(scales[:, None, None]), down


def _largest(values: Tensor, k: int) -> Tensor:
    """The k largest of each row."""
    return values.topk(min(k, values.shape[1]), dim=1, sorted=False).values


def _score(delta: Delta, ks: Any, l1: float, fro2: float, sums: Mapping[int, float]) -> ModuleScore:
    if not (math.isfinite(l1) and math.isfinite(fro2)):
        raise overflow(delta)
    entries = math.prod(delta.shape)
    # The whole, whose sum is rounded more, is never less than its part.
    l1 = max(l1, *sums.values())
    wanted = {k: l1 if k >= entries else sums[k] for k in sorted(set(ks))}
    return ModuleScore(tuple(delta.shape), delta.rank, float(delta.alpha), l1, fro2, wanted)
