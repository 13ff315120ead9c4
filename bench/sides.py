"""What scoring a side of several LoRAs costs: `python -m bench.sides`.

Every ninth attention linear of SDXL, rank 32, one thread, processor time, the least of the rounds in turns: a side of
one file, of two and of three. A side of n has n products where one has one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from bench.machine import describe_machine
from bench.scoring import QUICK_STEP, sdxl_shapes, write_file
from klora.fusion.scores import score_deltas, standard_ks
from klora.lora.file import LoraFile
from klora.lora.side import Side, WeightedLora

WEIGHTS = (0.8, 0.5, 0.3)


def seconds(side: Side) -> float:
    """Processor seconds of scoring a side's modules at their standard K."""
    start = time.process_time()
    score_deltas({name: (delta, standard_ks(delta.rank)) for name, delta in side.modules.items()})
    return time.process_time() - start


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.sides", description=__doc__)
    parser.add_argument("--rank", type=int, default=32, metavar="R")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    shapes = dict(list(sdxl_shapes("attention").items())[::QUICK_STEP])
    with tempfile.TemporaryDirectory() as folder:
        files = [write_file(Path(folder) / f"{i}.safetensors", shapes, args.rank, i) for i in range(len(WEIGHTS))]
        parts = [WeightedLora(LoraFile.open(file), weight) for file, weight in zip(files, WEIGHTS, strict=True)]
        sides = [Side(tuple(parts[: count + 1])) for count in range(len(parts))]
        rounds = [[seconds(side) for side in sides] for _ in range(args.rounds)]
    found = [min(times) for times in zip(*rounds, strict=True)]
    print(describe_machine())
    print("| LoRAs a side | rank of the sum | scoring | ratio |")
    print("|---:|---:|---:|---:|")
    for count, least in enumerate(found, 1):
        print(f"| {count} | {count * args.rank} | {least:.2f} s | {least / found[0]:.2f}× |")


if __name__ == "__main__":
    main()
