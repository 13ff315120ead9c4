"""What a benchmark ran on, without names that point to one machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


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
