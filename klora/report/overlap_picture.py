"""How much two files are in each other's way, drawn block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from klora.report.overlap import Overlap, in_words
from klora.report.picture import COLOURS

if TYPE_CHECKING:
    from PIL import Image as Images

WIDTH, HEIGHT, DPI = 1200, 760, 100


def overlap_picture(overlap: Overlap, title: str) -> Images.Image:
    """Draw, for each block, the cosine above and what is shared below. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    parts = list(overlap.blocks.values())
    places = np.arange(len(parts))
    # A "$" in a file name would begin a formula.
    figure.suptitle(f"{title}: {in_words(overlap)}".replace("$", r"\$"), fontsize=13, wrap=True)
    above.bar(places, [part.cosine for part in parts], width=0.6, color="#6B7280")
    above.axhline(0, color="#222222", linewidth=1)
    above.set(ylim=(-1, 1))
    above.set_ylabel("cosine of both ΔW", fontsize=12)
    sides = (("subject inside style", "c"), ("style inside subject", "s"))
    for side, (label, letter) in enumerate(sides):
        heights = [part.inside[side] for part in parts]
        below.bar(places + 0.4 * side - 0.2, heights, width=0.38, color=COLOURS[letter], label=label)
    for side, (label, marker) in enumerate((("output spaces shared", "^"), ("input spaces shared", "v"))):
        heights = [part.overlaps[side] for part in parts]
        below.plot(places, heights, marker, color="#222222", markersize=7, label=label)
    below.set(ylim=(0, 1))
    below.set_ylabel("fraction of energy, of space", fontsize=12)
    below.set_xticks(places, list(overlap.blocks), rotation=30, ha="right", fontsize=11)
    below.legend(ncols=4, frameon=False, fontsize=11, loc="upper center")
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
