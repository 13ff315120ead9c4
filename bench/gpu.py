"""What K-LoRA costs on a GPU: `python -m bench.gpu`.

Three things, each of which can be asked for alone. Blocks of SD 1.5, SDXL and FLUX (single and double) with random
weights are run in turns: without a LoRA, with one LoRA merged, with hooks of which none acts (what Python costs), with
K-LoRA whose products are made one by one, and with those of modules of one input joined (what is done on a GPU); the
operations of a forward are counted. Pairs of SDXL files with all 722 linears are scored on the CPU and on the device.
Whole pictures are made by a pipeline of SDXL's widths, as `bench.picture` does.

`--device cpu --shrink 99 --pixels 64` tries it where there is no GPU. What has been measured is printed and written at
once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch

import bench.picture
from bench.blocks import HEADS, WAYS, make_blocks, measure, operations
from bench.machine import describe_machine, timed
from bench.memory import MB
from bench.model import make_pipeline, open_pair, write_pair
from bench.scoring import sdxl_shapes
from klora.fusion.device_scores import score_low_rank
from klora.fusion.scores import FileScores, score_deltas, standard_ks
from klora.lora.file import LoraFile
from klora.settings import Settings

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
Row = dict[str, Any]
Keep = Callable[[str, Row], None]
"""Takes a row of a table, once it has been measured."""


def measure_blocks(options: argparse.Namespace, device: torch.device, keep: Keep) -> None:
    """Forwards of blocks: ratios to one merged LoRA, and operations."""
    print("\n| model | type | rank | pictures | merged, ms | no LoRA | hooks alone | one by one | K-LoRA |", end=" ")
    print("operations: merged | one by one | K-LoRA | session, ms |")
    print(f"| --- | --- |{' ---: |' * 11}", flush=True)
    for model, dtype, rank, batch in product(options.models, options.dtypes, options.ranks, options.batches):
        pixels = options.pixels // 2 if model == "sd15" else options.pixels
        blocks = make_blocks(model, options.depth, batch, pixels, device, DTYPES[dtype], options.shrink)
        with tempfile.TemporaryDirectory() as folder:
            shapes = {name: tuple(layer.weight.shape) for name, layer in blocks.linears().items()}
            pair = open_pair(write_pair(Path(folder), shapes, rank))
            seconds = measure(blocks, pair, device, options.rounds)
            counts = operations(blocks, pair, device)
        row = {"model": model, "dtype": dtype, "rank": rank, "batch": batch}
        keep("blocks", {**row, "seconds": seconds, "operations": counts})
        times = [f"{seconds[way] / seconds['merged']:.3f}×" for way in WAYS if way != "merged"]
        counted = [str(counts[way]) for way in ("merged", "one by one", "K-LoRA")]
        columns = [*map(str, row.values()), f"{seconds['merged'] * 1e3:.2f}", *times, *counted]
        print(f"| {' | '.join(columns)} | {seconds['session again'] * 1e3:.1f} |", flush=True)


def measure_scoring(options: argparse.Namespace, device: torch.device, keep: Keep) -> None:
    """A pair with all linears of SDXL: scored on the CPU and on the device, and from new files to a plan."""
    shapes: dict[str, tuple[int, ...]] = dict(list(sdxl_shapes("linears").items())[:: options.shrink])
    print("\n| modules | rank | on the CPU, s | on the device, s | again, s | files to plan, s |", end=" ")
    print("largest difference | peak, MB |")
    print(f"|{' ---: |' * 8}", flush=True)
    for rank in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            files = write_pair(Path(folder), shapes, rank)
            deltas = [delta for file in files for delta in LoraFile.open(file).modules.values()]
            wanted = {str(number): (delta, standard_ks(rank)) for number, delta in enumerate(deltas)}
            found: list[FileScores] = []
            seconds = {
                "on the CPU": timed(lambda: found.append(score_deltas(wanted))),  # noqa: B023
                "on the device": timed(lambda: found.append(score_low_rank(wanted, device)), device=device),  # noqa: B023
            }
            with peak_memory(device) as peak:
                seconds["again"] = timed(lambda: score_low_rank(wanted, device), device=device)  # noqa: B023
            seconds["files to plan"] = timed(
                lambda: open_pair(files).plan(Settings(scope="linear"), device=device)  # noqa: B023
            )
        difference = largest_difference(*found)
        row = {"modules": len(shapes), "rank": rank}
        keep("scoring", {**row, "seconds": seconds, "difference": difference, "peak": peak[0]})
        columns = [*map(str, row.values()), *(f"{value:.3f}" for value in seconds.values())]
        print(f"| {' | '.join(columns)} | {difference:.1e} | {peak[0] / MB:.0f} |", flush=True)


def measure_pictures(options: argparse.Namespace, device: torch.device, keep: Keep) -> None:
    """Whole pictures: the tables of `bench.picture`."""
    # The widest two levels of SDXL, which has a third one above them.
    size = {"pixels": options.pixels // 2, "steps": options.steps}
    channels = (640, 1280) if options.shrink == 1 else (64, 64)
    pipe = make_pipeline(10 // options.shrink or 1, channels)
    for dtype, rank in product(options.dtypes, options.ranks):
        print(f"\n{dtype}, rank {rank}, {size['steps']} steps\n", flush=True)
        pipe.to(device, DTYPES[dtype])
        with peak_memory(device) as peak:
            seconds, parts = bench.picture.measure(pipe, rank=rank, rounds=min(3, options.rounds), **size)
        keep("pictures", {"dtype": dtype, "rank": rank, "seconds": seconds, "parts": parts, "peak": peak[0]})
        bench.picture.report(seconds, parts)


def largest_difference(one: FileScores, other: FileScores) -> float:
    """The largest relative difference of any sum."""
    pairs = [(score, other[name]) for name, score in one.items()]
    sums = [(ours.sums[k], theirs.sums[k]) for ours, theirs in pairs for k in ours.sums]
    return max(abs(b / a - 1) for a, b in (*sums, *((ours.l1, theirs.l1) for ours, theirs in pairs)))


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[int]]:
    """Afterwards, the bytes that were allocated on the device at the peak beside those before; 0 where it is none."""
    found: list[int] = []
    if device.type != "cuda":
        yield found
        found.append(0)
        return
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield found
    found.append(torch.cuda.max_memory_allocated(device) - before)


MEASUREMENTS = {"blocks": measure_blocks, "scoring": measure_scoring, "pictures": measure_pictures}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="What K-LoRA costs on a GPU.")
    parser.add_argument("what", nargs="*", metavar="|".join(MEASUREMENTS), help="what is measured (all of it)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", choices=tuple(HEADS), default=list(HEADS))
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["fp16", "bf16"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 32, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="pictures at once")
    parser.add_argument("--pixels", type=int, default=1024, help="side of the square pictures (half of it for sd15)")
    parser.add_argument("--steps", type=int, default=20, help="of whole pictures")
    parser.add_argument("--depth", type=int, default=10, help="blocks in a row")
    parser.add_argument("--shrink", type=int, default=1, help="times smaller models, to try it on a CPU (1)")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of blocks; of whole pictures at most 3")
    parser.add_argument("--json", type=Path, help="where to keep the results")
    options = parser.parse_args(argv)
    if unknown := {*options.what} - MEASUREMENTS.keys():
        parser.error(f"{', '.join(sorted(unknown))} cannot be measured; choose among {', '.join(MEASUREMENTS)}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "bench.gpu: there is no GPU here; run it where there is one, or try it with --device cpu\n")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    results: dict[str, Any] = {"machine": f"{describe_machine()}; {name}"}
    print(results["machine"])

    def keep(table: str, row: Row) -> None:
        results.setdefault(table, []).append(row)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")

    for what in options.what or MEASUREMENTS:
        MEASUREMENTS[what](options, device, keep)


if __name__ == "__main__":
    main()
