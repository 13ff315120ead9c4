"""Rendering of one picture: a pure function of subject, style, ground and seed."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from training.drawing.styles import GROUNDS, NAMED_INKS, Style, texture_mask
from training.drawing.subjects import PART_COLOURS, Part, Subject, parts_of

SIZE = 64
_FINE = 3
"""Samples along a pixel's side."""
_INDEX = {name: i + 1 for i, name in enumerate(PART_COLOURS)}
_WIDTHS = {"none": 0, "thin": 5, "bold": 8, "dashed": 6, "heavy": 10}
"""Contour widths in samples."""


@cache
def _grid() -> tuple[np.ndarray, np.ndarray]:
    ticks = (np.arange(SIZE * _FINE, dtype=np.float32) + 0.5) / _FINE
    return np.ascontiguousarray(np.broadcast_to(ticks[None], (len(ticks),) * 2)), np.ascontiguousarray(
        np.broadcast_to(ticks[:, None], (len(ticks),) * 2)
    )


def _draw(draw: ImageDraw.ImageDraw, part: Part, corner: tuple[float, float], side: float, value: int) -> None:
    points = [(corner[0] + px * side, corner[1] + py * side) for px, py in part.points]
    if part.kind == "oval":
        draw.ellipse([points[0], points[1]], fill=value)
    else:
        draw.polygon(points, fill=value)


def _maps(subject: Subject, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """For every sample the index of its colour (0: the ground), and of its surface (0: none, 255: a mark)."""
    n = SIZE * _FINE
    side = n * rng.uniform(0.82, 0.95)
    slack = n - side
    corner = (slack / 2 + rng.uniform(-0.35, 0.35) * slack, slack / 2 + rng.uniform(-0.35, 0.35) * slack)
    colours, surfaces = Image.new("L", (n, n)), Image.new("L", (n, n))
    on_colours, on_surfaces = ImageDraw.Draw(colours), ImageDraw.Draw(surfaces)
    for i, part in enumerate(parts_of(subject)):
        _draw(on_colours, part, corner, side, _INDEX[part.colour])
        _draw(on_surfaces, part, corner, side, 255 if part.mark else i + 1)
    return np.asarray(colours), np.asarray(surfaces)


def _contour(surfaces: np.ndarray, width: int) -> np.ndarray:
    """Samples within half a width of a border between two surfaces or with the ground; marks have none."""
    bare = surfaces == 255
    edge = np.zeros(surfaces.shape, bool)
    h = width // 2
    padded = np.pad(surfaces, h)
    n = len(surfaces)
    for dy, dx in ((0, h), (h, 0), (h * 7 // 10, h * 7 // 10), (h * 7 // 10, -h * 7 // 10)):
        one = padded[h + dy : h + dy + n, h + dx : h + dx + n]
        two = padded[h - dy : h - dy + n, h - dx : h - dx + n]
        edge |= (one != two) & (one != 255) & (two != 255)
    return edge & ~bare


def render(subject: Subject, style: Style, ground: str, seed: int) -> np.ndarray:
    """uint8 picture (64, 64, 3)."""
    rng = np.random.default_rng(seed)
    colours, surfaces = _maps(subject, rng)
    table = np.array([GROUNDS[ground], *PART_COLOURS.values()], np.float32)
    ink = np.array(NAMED_INKS[style.ink], np.float32)
    fine = table[colours]
    x, y = _grid()
    if style.texture != "flat":
        covered = texture_mask(style, x, y, rng) & (surfaces > 0) & (surfaces < 255)
        fine[covered] += style.strength * (ink - fine[covered])
    if style.contour != "none":
        line = _contour(surfaces, _WIDTHS[style.contour])
        if style.contour == "dashed":
            line &= (x + 0.55 * y + rng.uniform(0, 9)) % 7.0 < 4.2
        fine[line] += style.contour_strength * (ink - fine[line])
    return fine.reshape(SIZE, _FINE, SIZE, _FINE, 3).mean((1, 3), dtype=np.float32).round().astype(np.uint8)
