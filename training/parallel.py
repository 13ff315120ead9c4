"""Training by two processes of one thread each, with checkpoints that are written in one move.

On two cores this is faster than one process of two threads, which meet after every operation.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORKERS = 2


def share_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average the gradients over the processes; each has the same ones afterwards."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch._utils._flatten_dense_tensors(gradients)
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(mean).div_(WORKERS)


def write_checkpoint(file: Path, state: dict[str, Any]) -> None:
    """Write in one move, so that an interrupted write loses nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


class Pace:
    """Says when a number of seconds has gone by again."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.last = seconds, time.time()

    def due(self) -> bool:
        """True once for every stretch of that length."""
        if time.time() - self.last < self.seconds:
            return False
        self.last = time.time()
        return True


def _enter(rank: int, meeting: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORKERS)
    work(rank, *arguments)
    dist.destroy_process_group()


def run_workers(work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(rank, *arguments)` in each of the processes, and wait for all."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_enter, (str(Path(folder) / "meeting"), work, arguments), nprocs=WORKERS)


def part_of(batch: int, rank: int) -> range:
    """The places of a batch that a process fills."""
    return range(rank * batch // WORKERS, (rank + 1) * batch // WORKERS)


def average_into(average: torch.nn.Module, nets: torch.nn.Module, decay: float) -> None:
    """Move an exponential moving average of weights one step on."""
    pairs = zip(average.parameters(), nets.parameters(), strict=True)
    with torch.no_grad():
        torch._foreach_lerp_(*map(list, zip(*pairs, strict=True)), 1 - decay)
