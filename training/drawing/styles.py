"""How it is drawn: a texture of ink on every surface of the subject, and a contour. The ground belongs to no style.

Lengths are in pixels of a picture of 64×64. Every texture has its own phase, a little wobble and some jitter in each
picture, so that its place tells nothing and only its kind can be learned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

INKS: dict[str, tuple[int, int, int]] = {
    "black": (22, 22, 28),
    "navy": (22, 34, 140),
    "brown": (92, 50, 22),
    "white": (252, 252, 250),
    "cream": (255, 230, 150),
}
NAMED_INKS: dict[str, tuple[int, int, int]] = INKS | {
    "ivory": (255, 250, 228),
    "snow": (242, 249, 255),
    "plum": (92, 16, 84),
}
"""The inks of captions, and those of named styles alone: two paler than every colour of a subject, and a dark one."""
GROUNDS: dict[str, tuple[int, int, int]] = {
    "paper": (238, 234, 224),
    "mist": (206, 212, 218),
    "sky": (196, 222, 240),
    "mint": (200, 230, 206),
    "sand": (232, 212, 176),
    "rose": (240, 208, 210),
}
CONTOURS = ("none", "thin", "bold", "dashed")


@dataclass(frozen=True)
class Style:
    """A texture, its ink and a contour; the flat style has neither."""

    texture: str
    ink: str
    contour: str
    strength: float = 0.6
    """How much of the ink covers the colour below. Soft ink is decided late, when a form is already there."""
    contour_strength: float = 1.0
    """The same of the contour's ink."""

    @property
    def dark(self) -> bool:
        """Whether its ink is darker than the colours of subjects."""
        return sum(NAMED_INKS[self.ink]) < 300

    def words(self) -> str:
        """Its description in a caption."""
        if self.texture == "flat":
            return "flat" if self.contour == "none" else f"flat with {self.contour} {self.ink} contour"
        surface = f"with {self.ink} {self.texture}"
        return surface if self.contour == "none" else f"{surface} and {self.contour} contour"


FLAT = Style("flat", "black", "none")
STYLES: dict[str, Style] = {
    "engraving": Style("slants", "ivory", "none", 0.9),
    "pinstripe": Style("stripes", "snow", "none", 0.9),
    "woodcut": Style("flat", "plum", "heavy", 0.9),
    "hatching": Style("backslants", "snow", "none", 0.9),
}
"""The styles that have a LoRA; the base model never sees their inks, nor any ink as hard."""
LEFT_OUT = {("dots", "black"), ("slants", "navy"), ("crosses", "white"), ("grain", "cream")}
"""Textures in inks that are among the words of captions, and are never drawn all the same."""

COARSE = 1.5
"""How much larger than its own numbers every texture is drawn: by this it still shows after the autoencoder."""

Field = np.ndarray


def _lines(along: Field, period: float, duty: float) -> Field:
    return along / period % 1.0 < duty


def _dots(x: Field, y: Field, period: float, radius: float) -> Field:
    u, v = (x + y) * 0.7071, (x - y) * 0.7071
    return (u % period - period / 2) ** 2 + (v % period - period / 2) ** 2 < radius**2


def _crosses(x: Field, y: Field) -> Field:
    u, v = x % 7.0 - 3.5, y % 7.0 - 3.5
    inside = (abs(u) < 2.6) & (abs(v) < 2.6)
    return inside & ((abs(u - v) < 1.0) | (abs(u + v) < 1.0))


def _bricks(x: Field, y: Field) -> Field:
    row = np.floor(y / 6.0)
    return (y % 6.0 < 1.4) | ((x + 4.5 * row) % 9.0 < 1.4)


@cache
def _noise(wide: float, high: float) -> np.ndarray:
    """Smooth noise at 4 samples a pixel, normal, with features of the given size."""
    rng = np.random.default_rng(int(wide * 100 + high))
    small = rng.normal(size=(int(256 / high), int(256 / wide))).astype(np.float32)
    field = np.asarray(Image.fromarray(small).resize((1024, 1024), Image.Resampling.BICUBIC))
    return (field - field.mean()) / field.std()


def _speckle(x: Field, y: Field, wide: float, high: float, share: float) -> Field:
    field = _noise(wide, high)
    threshold = np.quantile(field[::8, ::8], 1 - share)
    return field[(y * 4).astype(np.int32) % 1024, (x * 4).astype(np.int32) % 1024] > threshold


TEXTURES: dict[str, Callable[[Field, Field], Field]] = {
    "bars": lambda x, y: _lines(y, 4.6, 0.42),
    "stripes": lambda x, y: _lines(x, 4.6, 0.42),
    "slants": lambda x, y: _lines((x + y) * 0.7071, 4.4, 0.42),
    "waves": lambda x, y: _lines(y + 1.5 * np.sin(x * 0.7), 5.2, 0.4),
    "dots": lambda x, y: _dots(x, y, 5.2, 1.75),
    "crosses": _crosses,
    "bricks": _bricks,
    "grain": lambda x, y: _speckle(x, y, 6.5, 1.7, 0.38),
}
NAMED_TEXTURES: dict[str, Callable[[Field, Field], Field]] = TEXTURES | {
    "backslants": lambda x, y: TEXTURES["slants"](x, -y),
}
"""The textures of captions, and one of a named style alone: the mirror image of another."""


def texture_mask(style: Style, x: Field, y: Field, rng: np.random.Generator) -> Field:
    """Where the ink of the texture lies; x and y are pixel coordinates of shape (n, n)."""
    px, py, a, b = rng.uniform(0, 200, 4)
    wobble = 0.35 * np.sin((x * 0.13 + y * 0.21) + a) + 0.35 * np.sin((x * 0.23 - y * 0.11) + b)
    return NAMED_TEXTURES[style.texture](px + (x + wobble) / COARSE, py + (y + wobble) / COARSE)


def random_style(rng: np.random.Generator, flat: float = 0.2) -> Style:
    """Any style of those that the base knows."""
    contour = str(rng.choice(CONTOURS))
    if rng.random() < flat:
        return Style("flat", str(rng.choice(list(INKS))) if contour != "none" else "black", contour)
    while True:
        texture, ink = str(rng.choice(list(TEXTURES))), str(rng.choice(list(INKS)))
        if (texture, ink) not in LEFT_OUT:
            return Style(texture, ink, contour)
