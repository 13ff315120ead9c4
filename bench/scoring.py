"""What scoring a file costs: `python -m bench.scoring`.

Random SDXL files (fp16, kohya names; the 560 attention linears, or all 722 linears of the transformer blocks and their
projections) are scored in two ways, some modules at a time in turns: blockwise as klora does it, one module per core,
for the sums of all standard K, L1 and the Frobenius norm; and plainly, one module after the other on all cores, forming
ΔW = BA whole and taking `torch.topk` for the one K = rank² and the L1 sum. In between, the products alone. Then the
whole way through the cache, of a pair that is new and of a file that is known, and the peak of memory in a process of
its own.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import tempfile
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.machine import Clock, add_busy, clock_of, describe_machine, timed, typical
from klora.cache import ScoreCache
from klora.fusion.scores import BLOCK_ENTRIES, score_deltas, standard_ks
from klora.lora.deltas import Delta
from klora.lora.file import LoraFile
from klora.lora.side import Side
from klora.pair import Pair
from klora.settings import Settings

# Where SDXL has transformers: container, attentions in it, layers of each, channels.
TRANSFORMERS = (
    ("down_blocks.1", 2, 2, 640),
    ("down_blocks.2", 2, 10, 1280),
    ("mid_block", 1, 10, 1280),
    ("up_blocks.0", 3, 10, 1280),
    ("up_blocks.1", 3, 2, 640),
)
CONTEXT = 2048
TURN = 80  # modules that one way scores before it is the other's turn
QUICK_STEP = 9  # prime to the 8 attention (10 with feed-forward) linears of a layer, so that all kinds are among them


def sdxl_shapes(modules: str) -> dict[str, tuple[int, int]]:
    """Shapes (out, in) of SDXL's attention linears, or of all linears inside its transformers, by diffusers path."""
    shapes: dict[str, tuple[int, int]] = {}
    for container, attentions, layers, width in TRANSFORMERS:
        for a in range(attentions):
            transformer = f"{container}.attentions.{a}"
            if modules == "linears":
                shapes |= {f"{transformer}.{name}": (width, width) for name in ("proj_in", "proj_out")}
            for layer in range(layers):
                block = f"{transformer}.transformer_blocks.{layer}"
                for attention, source in (("attn1", width), ("attn2", CONTEXT)):
                    shapes |= {f"{block}.{attention}.{name}": (width, width) for name in ("to_q", "to_out.0")}
                    shapes |= {f"{block}.{attention}.{name}": (width, source) for name in ("to_k", "to_v")}
                if modules == "linears":
                    shapes[f"{block}.ff.net.0.proj"] = (8 * width, width)
                    shapes[f"{block}.ff.net.2"] = (width, 4 * width)
    return shapes


def write_file(path: Path, shapes: dict[str, tuple[int, int]], rank: int, seed: int = 0) -> Path:
    """Write a kohya file of random fp16 weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, columns, generator=generator).half()
        tensors[f"{key}.lora_up.weight"] = (torch.randn(rows, rank, generator=generator) * 0.01).half()
        tensors[f"{key}.alpha"] = torch.tensor(rank / 2).half()
    save_file(tensors, path)
    return path


def plain_scores(delta: Delta, k: int) -> tuple[float, float]:
    """(sum of the k largest |entries|, L1), straight from the definition."""
    entries = delta.matrix().abs().flatten()
    return float(entries.topk(min(k, entries.numel())).values.sum(dtype=torch.float64)), float(entries.sum())


def products(turn: Sequence[Delta]) -> None:
    """ΔW of each module, block by block into the same memory: the floor of whatever looks at every entry."""
    block = torch.empty(BLOCK_ENTRIES)
    for delta in turn:
        step = BLOCK_ENTRIES // delta.columns
        with delta.loaded():
            for start in range(0, delta.shape[0], step):
                delta.rows(start, min(start + step, delta.shape[0]), out=block)


def compare(deltas: Sequence[Delta], rank: int, rounds: int, clock: Clock) -> tuple[float, ...]:
    """(blockwise, products alone, plain) seconds for all `deltas`, some at a time in turns, median of the rounds."""
    k = rank**2

    def blockwise(turn: Sequence[Delta]) -> list[float]:
        return [score.sums[k] for score in score_deltas({d.key: (d, {*standard_ks(d.rank), k}) for d in turn}).values()]

    def plain(turn: Sequence[Delta]) -> list[float]:
        return [plain_scores(delta, k)[0] for delta in turn]

    totals: tuple[float, ...] = (0.0, 0.0, 0.0)
    for start in range(0, len(deltas), TURN):
        turn = deltas[start : start + TURN]
        for one, other in zip(blockwise(turn), plain(turn), strict=True):  # also warms up
            if not math.isclose(one, other, rel_tol=1e-5):
                raise AssertionError(f"blockwise and plain scores differ: {one} and {other}")
        ways = [partial(way, turn) for way in (blockwise, products, plain)]
        times = [tuple(timed(way, clock) for way in ways) for _ in range(rounds)]
        medians = (typical(way, clock) for way in zip(*times, strict=True))
        totals = tuple(total + median for total, median in zip(totals, medians, strict=True))
    return totals


def through_the_cache(paths: list[Path], folder: Path, rounds: int, clock: Clock) -> dict[str, float]:
    """Seconds of a pair from paths to plan, nothing known; of a file from path to scores, all known; of the latter."""

    def cold() -> None:
        Pair.open(paths[0], paths[1], ScoreCache(folder)).plan(Settings())

    def scores() -> None:
        ScoreCache(folder).scores(Side.alone(LoraFile.open(paths[0])))

    first, file = timed(cold, clock), Side.alone(LoraFile.open(paths[0]))
    again = partial(ScoreCache(folder).scores, file)
    warm = [(timed(scores, clock), timed(again, clock)) for _ in range(max(rounds, 5))]
    return {
        "cold": first,
        "cached, with open": typical([one for one, _ in warm], clock),
        "cached scores": typical([other for _, other in warm], clock),
    }


def anonymous_memory() -> int:
    """Bytes of memory of this process that are not pages of mapped files; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def peak_memory(path: Path) -> int:
    """Bytes that scoring the file needs beyond what the process had before, at the peak."""
    file = LoraFile.open(path)
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))  # the libraries' own buffers
    before = peak = anonymous_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    score_deltas({name: (delta, standard_ks(delta.rank)) for name, delta in file.modules.items()})
    done.set()
    watcher.join()
    return peak - before


def report(modules: str, rank: int, step: int, rounds: int, folder: Path, clock: Clock) -> None:
    """Measure one kind of file and print a line."""
    shapes = sdxl_shapes(modules)
    paths = [write_file(folder / f"{seed}.safetensors", shapes, rank, seed) for seed in (1, 2)]
    deltas = list(LoraFile.open(paths[0]).modules.values())
    some = deltas[::step]
    found = compare(some, rank, rounds, clock)
    blockwise, floor, plain = (seconds * len(deltas) / len(some) for seconds in found)
    times = through_the_cache(paths, folder / f"cache-{modules}-{rank}", rounds, clock)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        memory = pool.apply(peak_memory, (paths[0],))
    seconds = f"{blockwise:.2f} s | {floor:.2f} s | {plain:.2f} s | {plain / blockwise:.1f}× | {times['cold']:.2f} s"
    cached = f"{times['cached, with open'] * 1e3:.0f} ms | {times['cached scores'] * 1e3:.1f} ms"
    print(f"| {modules}, {len(deltas)} | {rank} | {seconds} | {cached} | {memory / 2**20:.0f} MB |", flush=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.scoring", description="What scoring a file costs.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--modules", choices=("attention", "linears"), nargs="+", default=["attention", "linears"])
    parser.add_argument("--rounds", type=int, default=3, help="measurements, of which the median counts")
    parser.add_argument("--quick", action="store_true", help=f"compare every {QUICK_STEP}th module only")
    add_busy(parser)
    options = parser.parse_args()
    clock = clock_of(options)
    step = QUICK_STEP if options.quick else 1
    print(describe_machine())
    print(f"{'every ' + str(step) + 'th' if step > 1 else 'every'} module, {TURN} at a time in turns,", end=" ")
    print(f"median of {options.rounds}; K = rank²\n")
    print("| modules | rank | blockwise | products alone | plain topk | ratio |", end=" ")
    print("a pair, cold | cached: open + scores | scores alone | peak extra memory |")
    print(f"| --- |{' ---: |' * 9}")
    with tempfile.TemporaryDirectory() as folder:
        for modules in options.modules:
            for rank in options.ranks:
                report(modules, rank, step, options.rounds, Path(folder), clock)


if __name__ == "__main__":
    main()
