"""How much two files are in each other's way, drawn block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from klora.lora.names import block_label
from klora.report.overlap import Overlap, in_numbers, in_words
from klora.report.picture import DPI, FONT, LIGHT, WIDTH, Theme, dress, image_of, literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL import Image as Images

HEIGHT = 900
_MARKS = (("output spaces shared", "^"), ("input spaces shared", "v"))


def overlap_picture(overlap: Overlap, title: str | None, theme: Theme = LIGHT, width: int = WIDTH) -> Images.Image:
    """Draw, for each block, the cosine above and what is shared below. Needs matplotlib.

    `title` names what is compared; None where that, and how they meet, is said beside the picture.
    """
    from matplotlib.figure import Figure

    size = width / DPI, HEIGHT / DPI
    figure = Figure(figsize=size, dpi=DPI, facecolor=theme.background, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    heading = in_numbers(overlap) if title is None else f"{title}: {in_words(overlap)}"
    figure.suptitle(literal(heading), color=theme.ink, wrap=True, **FONT)
    _cosines(above, overlap, theme)
    _shares(below, overlap, theme)
    for axes in (above, below):
        dress(axes, theme, theme.ink)
    figure.legend(
        *below.get_legend_handles_labels(),
        ncols=2 if width >= WIDTH else 1,
        frameon=False,
        labelcolor=theme.ink,
        loc="outside lower center",
        **FONT,
    )
    return image_of(figure)


def _cosines(axes: Axes, overlap: Overlap, theme: Theme) -> None:
    parts = list(overlap.blocks.values())
    axes.bar(np.arange(len(parts)), [part.cosine for part in parts], width=0.6, color=theme.line)
    axes.axhline(0, color=theme.ink, linewidth=1)
    axes.set(ylim=(-1, 1))
    axes.set_ylabel("cosine", color=theme.ink, **FONT)


def _shares(axes: Axes, overlap: Overlap, theme: Theme) -> None:
    parts = list(overlap.blocks.values())
    places = np.arange(len(parts))
    for side, (label, letter) in enumerate((("subject inside style", "c"), ("style inside subject", "s"))):
        heights = [part.inside[side] for part in parts]
        axes.bar(places + 0.4 * side - 0.2, heights, width=0.38, color=theme.cells[letter], label=label)
    for side, (label, marker) in enumerate(_MARKS):
        heights = [part.overlaps[side] for part in parts]
        axes.plot(places, heights, marker, color=theme.ink, markersize=10, label=label)
    axes.set(ylim=(0, 1))
    axes.set_ylabel("fraction shared", color=theme.ink, **FONT)
    axes.set_xticks(places, [literal(block_label(block)) for block in overlap.blocks], rotation=30, ha="right")
