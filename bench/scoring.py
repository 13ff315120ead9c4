"""What scoring a file costs: `python -m bench.scoring`.

Random SDXL files (fp16, kohya names; the 560 attention linears, or all 722 linears of the transformer blocks and their
projections) are scored in two ways, some modules at a time in turns: blockwise as klora does it, one module per core,
for the sums of all standard K, L1 and the Frobenius norm; and plainly, one module after the other on all cores, forming
ΔW = BA whole and taking `torch.topk` for the one K = rank² and the L1 sum. Then the whole way of a file through the
cache, cold and warm, and the peak of memory in a process of its own.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import tempfile
import threading
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.machine import describe_machine, timed
from klora.cache import ScoreCache
from klora.fusion.scores import score_deltas, standard_ks
from klora.lora.deltas import Delta
from klora.lora.file import LoraFile

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


def write_file(path: Path, shapes: dict[str, tuple[int, int]], rank: int) -> Path:
    """Write a kohya file of random fp16 weights."""
    generator = torch.Generator().manual_seed(rank)
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


def compare(deltas: list[Delta], rank: int, rounds: int) -> tuple[float, float]:
    """(blockwise, plain) seconds for all `deltas`, some at a time in turns; of each turn the median over the rounds."""
    k = rank**2

    def blockwise(turn: list[Delta]) -> list[float]:
        return [score.sums[k] for score in score_deltas({d.key: (d, {*standard_ks(d.rank), k}) for d in turn}).values()]

    def plain(turn: list[Delta]) -> list[float]:
        return [plain_scores(delta, k)[0] for delta in turn]

    totals = [0.0, 0.0]
    for start in range(0, len(deltas), TURN):
        turn = deltas[start : start + TURN]
        for one, other in zip(blockwise(turn), plain(turn), strict=True):  # also warms up
            if not math.isclose(one, other, rel_tol=1e-5):
                raise AssertionError(f"blockwise and plain scores differ: {one} and {other}")
        times = [(timed(partial(blockwise, turn)), timed(partial(plain, turn))) for _ in range(rounds)]
        totals = [total + statistics.median(way) for total, way in zip(totals, zip(*times, strict=True), strict=True)]
    return totals[0], totals[1]


def through_the_cache(path: Path, folder: Path, rounds: int) -> dict[str, float]:
    """Seconds from a path to its scores: with nothing known, with everything known, and of the latter the scores."""
    cold = timed(lambda: ScoreCache(folder).scores(LoraFile.open(path)))
    file = LoraFile.open(path)
    warm = [
        (timed(lambda: ScoreCache(folder).scores(LoraFile.open(path))), timed(lambda: ScoreCache(folder).scores(file)))
        for _ in range(max(rounds, 5))
    ]
    return {
        "cold": cold,
        "cached, with open": statistics.median(one for one, _ in warm),
        "cached scores": statistics.median(other for _, other in warm),
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


def report(modules: str, rank: int, step: int, rounds: int, folder: Path) -> None:
    """Measure one kind of file and print a line."""
    path = write_file(folder / f"{modules}-{rank}.safetensors", sdxl_shapes(modules), rank)
    deltas = list(LoraFile.open(path).modules.values())
    some = deltas[::step]
    blockwise, plain = (seconds * len(deltas) / len(some) for seconds in compare(some, rank, rounds))
    times = through_the_cache(path, folder / "cache", rounds)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        memory = pool.apply(peak_memory, (path,))
    path.unlink()
    seconds = f"{blockwise:10.2f} {plain:8.2f} {plain / blockwise:6.2f}× {times['cold']:8.2f}"
    cached = f"{times['cached, with open'] * 1e3:10.1f} {times['cached scores'] * 1e3:8.1f}"
    print(f"{modules:9} {len(deltas):4} {rank:5} {seconds} {cached} {memory / 2**20:8.1f}", flush=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.scoring", description="What scoring a file costs.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--modules", choices=("attention", "linears"), nargs="+", default=["attention", "linears"])
    parser.add_argument("--rounds", type=int, default=3, help="measurements, of which the median counts")
    parser.add_argument("--quick", action="store_true", help=f"compare every {QUICK_STEP}th module only")
    options = parser.parse_args()
    step = QUICK_STEP if options.quick else 1
    print(describe_machine())
    print(f"blockwise and plain topk in turns: {'every ' + str(step) + 'th' if step > 1 else 'every'} module,", end=" ")
    print(f"{TURN} at a time, median of {options.rounds}; K = rank²")
    print(
        f"{'':20} {'blockwise':>10} {'plain':>8} {'':7} {'cold':>8} {'cached: open+scores':>19} {'memory':>8}".rstrip()
    )
    print(
        f"{'modules':14} {'rank':>5} {'s':>10} {'s':>8} {'ratio':>7} {'file, s':>8} {'ms':>10} {'ms':>8} {'MB':>8}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        for modules in options.modules:
            for rank in options.ranks:
                report(modules, rank, step, options.rounds, Path(folder))


if __name__ == "__main__":
    main()
