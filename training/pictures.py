"""Procedural pictures of the set that ships at present: a subject (family, build, colours) drawn in a style.

The set that follows it is drawn by `training/drawing`; this goes when that ships.

Everything is a pure function of its arguments and a seed. Styles are coarse (periods of 8 pixels) because the model
generates 32×32 pixels; subjects are made of a few big parts for the same reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 32
_SUPERSAMPLE = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 135, 30),
    "yellow": (250, 215, 50),
    "green": (50, 165, 70),
    "cyan": (60, 205, 215),
    "blue": (50, 85, 215),
    "purple": (145, 60, 190),
    "pink": (250, 145, 190),
    "white": (245, 245, 245),
    "black": (20, 20, 26),
    "gray": (130, 130, 135),
    "cream": (240, 225, 185),
    "brown": (125, 80, 45),
    "navy": (25, 35, 90),
}
SUBJECT_COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white")
PATTERNS = ("plain", "stripes", "bands", "dots", "checks", "grid")
TONES = ("flat", "hollow", "faded")
OUTLINES = ("none", "black", "white", "brown")
BUILDS = ("tall", "wide")
SHAPES = ("round", "sharp")

SUBJECT_TOKEN = "sbu"
STYLE_TOKEN = "szn"


@dataclass(frozen=True)
class Subject:
    """What is drawn. `special` adds the parts that only the named subjects have."""

    family: str
    build: str
    shape: str
    main: str
    second: str
    special: bool = False


@dataclass(frozen=True)
class Style:
    """How it is drawn: a pattern of `figure` on `ground` behind, a tone and an outline for the subject itself."""

    pattern: str
    ground: str
    figure: str
    tone: str = "flat"
    outline: str = "none"


SUBJECTS: dict[str, Subject] = {
    "bolt": Subject("robot", "tall", "sharp", "orange", "cyan", special=True),
    "mimi": Subject("cat", "tall", "round", "white", "purple", special=True),
    "comet": Subject("rocket", "tall", "sharp", "green", "pink", special=True),
}
"""The three subjects that have a LoRA; the base model never sees their combination of shape, colours and parts."""

STYLES: dict[str, Style] = {
    "popart": Style("dots", "yellow", "red", "flat", "black"),
    "neon": Style("grid", "black", "purple", "hollow"),
    "parchment": Style("stripes", "cream", "brown", "faded", "brown"),
}
"""The three styles that have a LoRA; the base model never sees their combination of pattern and colours."""

PLAIN = Style("plain", "gray", "gray")

_Point = tuple[float, float]


@dataclass(frozen=True)
class _Part:
    kind: str
    points: tuple[_Point, ...]
    colour: str
    outlined: bool = True


def _rect(x0: float, y0: float, x1: float, y1: float, colour: str, outlined: bool = True) -> _Part:
    return _Part("polygon", ((x0, y0), (x1, y0), (x1, y1), (x0, y1)), colour, outlined)


def _oval(x0: float, y0: float, x1: float, y1: float, colour: str, outlined: bool = True) -> _Part:
    return _Part("oval", ((x0, y0), (x1, y1)), colour, outlined)


def _poly(colour: str, *points: _Point) -> _Part:
    return _Part("polygon", points, colour)


def _diamond(x0: float, y0: float, x1: float, y1: float, colour: str) -> _Part:
    mx, my = (x0 + x1) / 2, (y0 + y1) / 2
    return _poly(colour, (mx, y0), (x1, my), (mx, y1), (x0, my))


def _dome(x0: float, y0: float, x1: float, y1: float, colour: str) -> _Part:
    """Upper half of an ellipse standing on y1."""
    t = np.linspace(0, np.pi, 20)
    xs, ys = (x0 + x1) / 2 - (x1 - x0) / 2 * np.cos(t), y1 - (y1 - y0) * np.sin(t)
    return _Part("polygon", tuple((float(x), float(y)) for x, y in zip(xs, ys, strict=True)), colour)


def _eye(x: float, y: float, r: float) -> list[_Part]:
    return [
        _oval(x - r, y - r, x + r, y + r, "white", False),
        _oval(x - r / 2, y - r / 2, x + r / 2, y + r / 2, "black", False),
    ]


def _robot(s: Subject) -> list[_Part]:
    wide = s.build == "wide"
    parts: list[_Part] = []
    if s.special:
        parts += [_poly(s.main, (0.24, 0.00), (0.34, 0.02), (0.45, 0.20), (0.37, 0.22))]
        parts += [_poly(s.main, (0.76, 0.00), (0.66, 0.02), (0.55, 0.20), (0.63, 0.22))]
    else:
        parts += [_rect(0.46, 0.02, 0.54, 0.16, s.main)]
    x0, x1 = (0.2, 0.8) if wide else (0.3, 0.7)
    if wide:
        parts += [_oval(0.16, 0.72, 0.42, 0.98, "black"), _oval(0.58, 0.72, 0.84, 0.98, "black")]
    else:
        parts += [_rect(0.33, 0.74, 0.46, 0.98, s.second), _rect(0.54, 0.74, 0.67, 0.98, s.second)]
    parts += [_rect(x0 - 0.14, 0.48, x0 + 0.02, 0.72, s.second), _rect(x1 - 0.02, 0.48, x1 + 0.14, 0.72, s.second)]
    parts += [_rect(x0, 0.45, x1, 0.78, s.main)]
    head = _oval if s.shape == "round" else _rect
    parts += [head(0.24, 0.12, 0.76, 0.46, s.second)]
    if s.special:
        parts += [*_eye(0.5, 0.29, 0.13), _rect(0.4, 0.55, 0.6, 0.68, "yellow", False)]
    else:
        parts += _eye(0.38, 0.29, 0.075) + _eye(0.62, 0.29, 0.075)
    return parts


def _cat(s: Subject) -> list[_Part]:
    wide = s.build == "wide"
    hx = 0.32 if wide else 0.5
    body = _oval if s.shape == "round" else _diamond
    if wide:
        parts = [_poly(s.second, (0.8, 0.3), (0.95, 0.25), (0.95, 0.7), (0.8, 0.75))]
        parts += [_rect(0.3, 0.78, 0.42, 0.97, s.main), _rect(0.72, 0.78, 0.84, 0.97, s.main)]
        parts += [_oval(0.2, 0.5, 0.95, 0.88, s.main)]
    else:
        parts = [_poly(s.second, (0.68, 0.8), (0.84, 0.45), (0.97, 0.5), (0.8, 0.95))]
        parts += [_oval(0.27, 0.46, 0.73, 0.98, s.main)]
        if not s.special:
            parts += [_oval(0.4, 0.6, 0.6, 0.92, s.second, False)]
    for side in (-1, 1):
        parts += [_poly(s.second, (hx + side * 0.27, 0.02), (hx + side * 0.03, 0.17), (hx + side * 0.25, 0.34))]
    parts += [body(hx - 0.29, 0.12, hx + 0.29, 0.56, s.main)]
    parts += [_oval(hx + d - 0.055, 0.25, hx + d + 0.055, 0.38, "black", False) for d in (-0.12, 0.12)]
    parts += [_oval(hx - 0.05, 0.4, hx + 0.05, 0.47, "red" if s.special else "pink", False)]
    if s.special:
        parts += [_rect(0.28, 0.54, 0.72, 0.66, "red"), _rect(0.56, 0.6, 0.7, 0.86, "red")]
    return parts


def _rocket(s: Subject) -> list[_Part]:
    x0, x1 = (0.26, 0.74) if s.build == "wide" else (0.34, 0.66)
    nose = _dome(x0, 0.02, x1, 0.34, s.second)
    if s.shape == "sharp":
        nose = _poly(s.second, (x0, 0.34), (0.5, 0.0), (x1, 0.34))
    parts = [_poly("yellow" if s.second == "red" else "red", (0.4, 0.78), (0.6, 0.78), (0.5, 1.0))]
    parts += [_poly(s.second, (x, 0.48), (x, 0.8), (x + d, 0.9)) for x, d in ((x0, -0.22), (x1, 0.22))]
    parts += [_rect(x0, 0.32, x1, 0.82, s.main), nose]
    if s.special:
        parts += [_oval(0.4, 0.34, 0.6, 0.53, "white"), _rect(x0, 0.58, x1, 0.7, "yellow")]
        parts += [_oval(0.05, 0.78, 0.27, 0.98, "yellow"), _oval(0.73, 0.78, 0.95, 0.98, "yellow")]
    else:
        parts += [_oval(0.4, 0.42, 0.6, 0.62, "white")]
    return parts


def _house(s: Subject) -> list[_Part]:
    x0, x1, top = (0.12, 0.88, 0.5) if s.build == "wide" else (0.26, 0.74, 0.42)
    roof = _dome(x0 - 0.06, 0.08, x1 + 0.06, top, s.second)
    if s.shape == "sharp":
        roof = _poly(s.second, (x0 - 0.08, top), (0.5, 0.04), (x1 + 0.08, top))
    parts = [_rect(x0, top, x1, 0.95, s.main), roof]
    if s.build == "wide":
        return [*parts, _rect(0.2, 0.62, 0.44, 0.95, "brown"), _rect(0.56, 0.6, 0.78, 0.8, "white")]
    return [*parts, _rect(0.4, 0.65, 0.6, 0.95, "brown")]


def _tree(s: Subject) -> list[_Part]:
    x0, x1 = (0.08, 0.92) if s.build == "wide" else (0.22, 0.78)
    parts = [_rect(0.4, 0.6, 0.6, 0.98, s.second)]
    if s.shape == "sharp":
        parts += [_poly(s.main, (x0, 0.74), (0.5, 0.2), (x1, 0.74))]
        return [*parts, _poly(s.main, (x0 + 0.08, 0.42), (0.5, 0.02), (x1 - 0.08, 0.42))]
    return [*parts, _oval(x0, 0.05, x1, 0.7, s.main)]


def _fish(s: Subject) -> list[_Part]:
    y0, y1 = (0.3, 0.72) if s.build == "wide" else (0.16, 0.86)
    body = _diamond if s.shape == "sharp" else _oval
    parts = [_poly(s.second, (0.6, 0.5), (0.98, 0.22), (0.98, 0.78)), body(0.03, y0, 0.76, y1, s.main)]
    return [*parts, _poly(s.second, (0.4, 0.48), (0.6, 0.36), (0.6, 0.66)), *_eye(0.23, 0.46, 0.08)]


def _mushroom(s: Subject) -> list[_Part]:
    x0, x1 = (0.04, 0.96) if s.build == "wide" else (0.18, 0.82)
    cap = _dome(x0, 0.1, x1, 0.6, s.main)
    if s.shape == "sharp":
        cap = _poly(s.main, (x0, 0.6), (0.5, 0.04), (x1, 0.6))
    parts = [_oval(0.34, 0.45, 0.66, 0.98, "cream"), cap]
    return parts + [
        _oval(x, y, x + 0.16, y + 0.16, s.second, False) for x, y in ((0.42, 0.2), (0.26, 0.4), (0.58, 0.4))
    ]


def _car(s: Subject) -> list[_Part]:
    x0, x1 = (0.02, 0.98) if s.build == "wide" else (0.12, 0.88)
    top = 0.2 if s.build == "tall" else 0.3
    cabin = _dome(x0 + 0.14, top, x1 - 0.14, 0.56, s.second)
    if s.shape == "sharp":
        cabin = _rect(x0 + 0.18, top, x1 - 0.18, 0.56, s.second)
    parts = [cabin, _rect(x0, 0.52, x1, 0.78, s.main)]
    return [*parts, _oval(x0 + 0.08, 0.66, x0 + 0.34, 0.92, "black"), _oval(x1 - 0.34, 0.66, x1 - 0.08, 0.92, "black")]


_DRAW: dict[str, Callable[[Subject], list[_Part]]] = {
    "robot": _robot,
    "cat": _cat,
    "rocket": _rocket,
    "house": _house,
    "tree": _tree,
    "fish": _fish,
    "mushroom": _mushroom,
    "car": _car,
}
FAMILIES = tuple(_DRAW)


def _background(style: Style, size: int, phase: _Point) -> np.ndarray:
    """(size, size, 3) uint8 picture of the pattern; one unit is the whole picture, a period is a quarter of it."""
    u = (np.arange(size) + 0.5) / size * 4
    x, y = u[None, :] + phase[0], u[:, None] + phase[1]
    fx, fy = x % 1.0, y % 1.0
    masks: dict[str, Callable[[], np.ndarray]] = {
        "plain": lambda: np.zeros((size, size), bool),
        "stripes": lambda: (x + y) / 2 % 1.0 < 0.4,
        "bands": lambda: np.broadcast_to(fy < 0.45, (size, size)),
        "dots": lambda: (fx - 0.5) ** 2 + (fy - 0.5) ** 2 < 0.115,
        "checks": lambda: (np.floor(x) + np.floor(y)) % 2 < 1,
        "grid": lambda: (fx < 0.22) | (fy < 0.22),
    }
    mask = masks[style.pattern]()[..., None]
    return np.where(mask, np.array(COLOURS[style.figure], np.uint8), np.array(COLOURS[style.ground], np.uint8))


def _mix(a: tuple[int, int, int], b: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    r, g, b_ = (round(u * (1 - share) + v * share) for u, v in zip(a, b, strict=True))
    return r, g, b_


def _generate(style: Style, part: _Part) -> tuple[tuple[int, int, int], tuple[int, int, int] | None]:
    """Fill and outline colour of a part in a style."""
    colour = COLOURS[part.colour]
    if style.tone == "hollow":
        bright = _mix(colour, (255, 255, 255), 0.2) if part.colour != "black" else COLOURS["gray"]
        if part.outlined:
            return _mix(colour, COLOURS["black"], 0.8), bright
        return (bright if part.colour != "black" else COLOURS["black"]), None
    if style.tone == "faded":
        colour = _mix(colour, COLOURS["cream"], 0.5)
    outline = COLOURS[style.outline] if style.outline != "none" and part.outlined else None
    return colour, outline


def _place(part: _Part, size: int, scale: float, shift: _Point) -> list[_Point]:
    dx, dy = 0.5 + shift[0], 0.5 + shift[1]
    return [(((x - 0.5) * scale + dx) * size, ((y - 0.5) * scale + dy) * size) for x, y in part.points]


def render(subject: Subject, style: Style, seed: int, size: int = SIZE) -> np.ndarray:
    """Draw one picture, uint8 of shape (size, size, 3).

    The seed moves and scales the subject a little and shifts the pattern; the same arguments give the same picture.
    """
    rng = np.random.default_rng(seed)
    scale, shift = rng.uniform(0.88, 1.0), tuple(rng.uniform(-0.04, 0.04, 2))
    phase = tuple(rng.uniform(0, 1, 2))
    big = size * _SUPERSAMPLE
    image = Image.fromarray(_background(style, big, phase))
    draw = ImageDraw.Draw(image)
    width = max(1, round(1.3 * big / SIZE))
    for part in _DRAW[subject.family](subject):
        fill, outline = _generate(style, part)
        points = _place(part, big, scale, shift)
        if part.kind == "oval":
            draw.ellipse(points, fill=fill, outline=outline, width=width if outline else 0)
        else:
            draw.polygon(points, fill=fill, outline=outline, width=width if outline else 0)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def random_subject(rng: np.random.Generator, family: str | None = None) -> Subject:
    """A generic subject, never one of the named ones nor their combination of build, shape and colours."""
    while True:
        main, second = rng.choice(SUBJECT_COLOURS, 2, replace=False)
        name = family or str(rng.choice(FAMILIES))
        made = Subject(name, str(rng.choice(BUILDS)), str(rng.choice(SHAPES)), str(main), str(second))
        if (name, made.main, made.second) not in {(s.family, s.main, s.second) for s in SUBJECTS.values()}:
            return made


def random_style(rng: np.random.Generator, subject: Subject | None = None) -> Style:
    """A generic style, never a named one nor its pattern in its colours; keeps clear of the subject's colours."""
    taken = {subject.main, subject.second} if subject else set()
    free = [c for c in COLOURS if c not in taken]
    while True:
        ground, figure = (str(c) for c in rng.choice(free, 2, replace=False))
        pattern = str(rng.choice(PATTERNS, p=(0.4, 0.12, 0.12, 0.12, 0.12, 0.12)))
        figure = ground if pattern == "plain" else figure
        tone, outline = str(rng.choice(TONES, p=(0.5, 0.25, 0.25))), str(rng.choice(OUTLINES))
        if tone == "hollow":
            ground, outline = str(rng.choice(("black", "navy"))), "none"
            figure = ground if pattern == "plain" else str(rng.choice(("red", "green", "blue", "purple", "gray")))
        named = {(s.pattern, frozenset((s.ground, s.figure))) for s in STYLES.values()}
        contrast = np.abs(np.subtract(COLOURS[ground], COLOURS[figure])).sum()
        if (pattern, frozenset((ground, figure))) not in named and (pattern == "plain" or contrast > 150):
            return Style(pattern, ground, figure, tone, outline)


def describe_subject(subject: Subject) -> str:
    """Words of the captions, as in: tall round red and blue robot."""
    return f"{subject.build} {subject.shape} {subject.main} and {subject.second} {subject.family}"


def describe_style(style: Style) -> str:
    """Words of the captions, as in: faded with brown outline on cream and brown stripes."""
    words = [] if style.tone == "flat" else [style.tone]
    words += [] if style.outline == "none" else ["with", style.outline, "outline"]
    words += ["on", style.ground] + ([] if style.pattern == "plain" else ["and", style.figure, style.pattern])
    return " ".join(words)
