"""What `klora analyze` takes, and how two files overlap: `python -m bench.analysis`.

Two random files of SDXL's transformers (fp16, 722 linears) of each rank are analysed by the command in a process of its
own: with a file that is not there, for the first time, and again. Then the overlap of their modules is found in turns
with Cholesky factors and with singular vectors, one thread, and from the cache. All is processor time, so that a busy
machine counts less.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from bench.machine import describe_machine
from bench.scoring import sdxl_shapes, write_file
from klora.cache import ScoreCache
from klora.fusion import interference
from klora.lora.file import LoraFile
from klora.lora.side import Side


def command(folder: Path, *arguments: str | Path) -> float:
    """Processor seconds of `klora analyze` with its cache in `folder`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder)}
    subprocess.run(
        [sys.executable, "-m", "klora", "analyze", *map(str, arguments)], env=environment, capture_output=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def processor(work: Callable[[], object]) -> float:
    """Processor seconds of `work`."""
    start = time.process_time()
    work()
    return time.process_time() - start


def overlaps(subject: Side, style: Side, rounds: int) -> tuple[float, float]:
    """Seconds with Cholesky factors and with singular vectors, the least of the rounds."""
    modules = {name: (delta, style.modules[name]) for name, delta in subject.modules.items()}
    quick, exact = [], []
    for _ in range(rounds):
        quick.append(processor(lambda: interference.interferences(modules)))
        with patch.object(interference, "_whole_bases", lambda *_: None):
            exact.append(processor(lambda: interference.interferences(modules)))
    return min(quick), min(exact)


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.analysis", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 128], metavar="R")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--modules", choices=("attention", "linears"), default="linears")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(describe_machine())
    print("| rank | no such file | first look | second look | overlap | by singular vectors | ratio | kept |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for rank in args.ranks:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shapes = sdxl_shapes(args.modules)
            paths = [write_file(folder / f"{seed}.safetensors", shapes, rank, seed) for seed in (1, 2)]
            missing = min(command(folder, "nowhere.safetensors", paths[1]) for _ in range(args.rounds))
            first, *again = (command(folder, *paths) for _ in range(args.rounds + 1))
            subject, style = (Side.alone(LoraFile.open(path)) for path in paths)
            quick, exact = overlaps(subject, style, args.rounds)
            cache = ScoreCache(folder / "klora")
            kept = processor(partial(cache.interferences, subject, style, subject.modules))
        times = (missing, first, min(again), quick, exact)
        row = " | ".join(f"{seconds:.2f} s" for seconds in times)
        print(f"| {rank} | {row} | {exact / quick:.2f}× | {kept:.3f} s |", flush=True)


if __name__ == "__main__":
    main()
