"""How cost grows with rank, pixels, modules and K: `python -m bench.cost`.

Measures, prints what it has measured, and draws it. Forwards are those of `bench.overhead`, as ratios to one merged
LoRA; beside K-LoRA stand the two bare products, which no way of leaving the weights alone can do without. Scoring is
that of `bench.scoring`, in processor time, on one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench.machine import Clock, add_busy, clock_of, describe_machine, timed, typical
from bench.overhead import measure, whole_unet
from bench.scoring import sdxl_shapes, write_file
from klora.fusion.scores import score_deltas, standard_ks
from klora.lora.file import LoraFile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "cost.png"
WAYS = ("merged", "bare products", "K-LoRA")
RANK, PIXELS = 32, 512
Curve = dict[float, float]
# Told apart by colour-blind people (Okabe & Ito), and by their dashes.
LINES: Mapping[str, Mapping[str, Any]] = {
    "K-LoRA": {"color": "#0072B2", "marker": "o"},
    "bare products": {"color": "#B35900", "marker": "s", "linestyle": "--"},
}
PANELS = (
    ("rank", f"rank, at {PIXELS}×{PIXELS} pixels", "a forward, × one merged LoRA"),
    ("pixels", f"side in pixels, at rank {RANK}", "a forward, × one merged LoRA"),
    ("modules", f"linears of SDXL, at rank {RANK}", "scoring a file, s of one core"),
    ("K", "K, of all 722 linears", "scoring a file, s of one core"),
)


def forwards(points: Mapping[int, tuple[int, int]], rounds: int, clock: Clock) -> dict[str, Curve]:
    """The ratios to one merged LoRA by way, at points of a (rank, side in pixels) each."""
    curves: dict[str, Curve] = {way: {} for way in WAYS[1:]}
    for at, (rank, pixels) in points.items():
        with tempfile.TemporaryDirectory() as folder:
            seconds = whole_unet(measure(rank, pixels, rounds, Path(folder), clock, WAYS))
        for way, curve in curves.items():
            curve[at] = seconds[way] / seconds["merged"]
    return curves


def scoring(every: int, rounds: int) -> tuple[Curve, Curve]:
    """Processor seconds of scoring a file: by number of modules, and of all by the largest K.

    Every so-manyth module is scored, and counts for so many.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shapes = sdxl_shapes("linears")
        path = write_file(Path(folder) / "a.safetensors", dict(list(shapes.items())[::every]), RANK)
        deltas = LoraFile.open(path).modules
        weight = len(shapes) / len(deltas)

        def seconds(names: Sequence[str], k: int | None = None) -> float:
            wanted = {name: (deltas[name], [k] if k else standard_ks(RANK)) for name in names}
            score = partial(score_deltas, wanted)
            return weight * typical([timed(score, time.process_time) for _ in range(rounds)], time.process_time)

        names = list(deltas)
        seconds(names)  # warms up
        by_modules = {
            float(round(len(some) * weight)): seconds(some) for some in (names[::step] for step in (8, 4, 2, 1))
        }
        by_k = {float(k): seconds(names, k) for k in (4**i for i in range(10))}
    return by_modules, by_k


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draw four panels, readable on a light and on a dark page."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8.4), dpi=100, facecolor="#FFFFFF", layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, x, y) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _draw_panel(axes, found[name])
        axes.set_xlabel(x, fontsize=15)
        axes.set_ylabel(y, fontsize=15)
        axes.tick_params(labelsize=14)
    figure.suptitle(f"{found['machine']}", fontsize=13, color="#4B5563")
    figure.savefig(path)


def _draw_panel(axes: Axes, curves: Mapping[str, Curve]) -> None:
    xs = sorted({x for curve in curves.values() for x in curve})
    for way, curve in curves.items():
        axes.plot(*zip(*sorted(curve.items()), strict=True), label=way, linewidth=2.5, markersize=8, **LINES[way])
    if xs[-1] / xs[0] >= 16:
        axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [_short(x) for x in xs])
    axes.minorticks_off()
    axes.grid(color="#E5E7EB")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(curves) > 1:
        axes.axhline(1.0, color="#222222", linewidth=1.5, linestyle=":", label="one merged LoRA")
        axes.legend(fontsize=14, frameon=False)
        axes.set_ylim(min(0.9, axes.get_ylim()[0]), max(1.2, axes.get_ylim()[1]))
    else:
        axes.set_ylim(bottom=0)


def _short(x: float) -> str:
    return f"{x:.0f}" if x < 1024 else f"{x / 1024:.0f}k"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.cost", description="How cost grows, drawn.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 32, 64, 128, 256])
    parser.add_argument("--pixels", type=int, nargs="+", default=[256, 384, 512, 768])
    parser.add_argument("--every", type=int, default=9, help="score every so-manyth linear of SDXL (9)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to keep what was measured")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="the PNG to write (docs/images/cost.png)")
    add_busy(parser)
    options = parser.parse_args(argv)
    clock = clock_of(options)
    found: dict[str, Any] = {"machine": describe_machine() + ("; processor time" if options.busy else "")}
    found["rank"] = forwards({rank: (rank, PIXELS) for rank in options.ranks}, options.rounds, clock)
    found["pixels"] = forwards({side: (RANK, side) for side in options.pixels}, options.rounds, clock)
    found["modules"], found["K"] = ({"K-LoRA": curve} for curve in scoring(options.every, options.rounds))
    print(json.dumps(found, indent=1, ensure_ascii=False))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    draw(found, options.picture)


if __name__ == "__main__":
    main()
