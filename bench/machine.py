"""What a benchmark ran on, without names that point to one machine."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Clock = Callable[[], float]


def add_busy(parser: argparse.ArgumentParser) -> None:
    """Add the option for a machine that does other work as well."""
    what = "one thread, processor time, and the least of it: what else goes on only adds"
    parser.add_argument("--busy", action="store_true", help=what)


def clock_of(options: argparse.Namespace) -> Clock:
    """The clock that was asked for; where it is the processor's, torch is left with one thread."""
    if not options.busy:
        return time.perf_counter
    torch.set_num_threads(1)
    return time.process_time


def timed(function: Callable[[], Any], clock: Clock = time.perf_counter, device: torch.device | None = None) -> float:
    """Seconds of one call, with all that it launches on a device."""
    wait_for(device)
    start = clock()
    function()
    wait_for(device)
    return clock() - start


def wait_for(device: torch.device | None) -> None:
    """Return once nothing is at work there."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def typical(times: Sequence[float], clock: Clock) -> float:
    """The median of some measurements; of processor time the least, which other work has disturbed the least."""
    return min(times) if clock is time.process_time else statistics.median(times)


def describe_machine() -> str:
    """One line: processor, cores, Python and torch."""
    info = Path("/proc/cpuinfo")
    models = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    processor = models[0] if models else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{processor}, {os.cpu_count()} cores, {threads} threads; {versions}"
