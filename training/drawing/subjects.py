"""What is drawn: families of simple forms, and the four named members that have a LoRA.

A form is a list of parts in a unit square, drawn in their order. Only form and colours belong to a subject; how a
surface is drawn belongs to the style, and the ground to neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (240, 130, 34),
    "yellow": (240, 190, 40),
    "green": (66, 165, 76),
    "teal": (40, 175, 180),
    "blue": (58, 104, 216),
    "purple": (142, 72, 190),
    "pink": (238, 120, 172),
}
"""The colours a subject can have: all of middle lightness, so that dark and pale inks show on each of them."""

FIXED_COLOURS: dict[str, tuple[int, int, int]] = {
    "eyeball": (250, 250, 250),
    "pupil": (24, 24, 30),
    "wood": (132, 88, 52),
    "tyre": (66, 66, 74),
    "stalk": (226, 208, 168),
}
"""The colours of small parts that a caption does not name."""

PART_COLOURS: dict[str, tuple[int, int, int]] = COLOURS | FIXED_COLOURS
BUILDS = ("tall", "wide")
SHAPES = ("round", "sharp")

Point = tuple[float, float]


@dataclass(frozen=True)
class Subject:
    """A member of a family. `fancy` ones have parts that the others have not, in the families that a subject is of."""

    family: str
    build: str
    shape: str
    main: str
    second: str
    fancy: bool = False

    def words(self) -> str:
        """Its description in a caption, without the build and shape."""
        return f"{'fancy ' * self.fancy}{self.main} and {self.second} {self.family}"


@dataclass(frozen=True)
class Part:
    """A filled polygon or oval (two corners). A `mark` (an eye, a button) keeps clear of texture and contour."""

    kind: str
    points: tuple[Point, ...]
    colour: str
    mark: bool = False


SUBJECTS: dict[str, Subject] = {
    "bolt": Subject("robot", "tall", "sharp", "orange", "teal", fancy=True),
    "mimi": Subject("cat", "tall", "round", "purple", "pink", fancy=True),
    "comet": Subject("rocket", "tall", "sharp", "pink", "blue", fancy=True),
    "finn": Subject("fish", "wide", "round", "blue", "pink", fancy=True),
}
"""The subjects that have a LoRA."""
LEFT_OUT = {
    ("robot", "orange", "teal"),
    ("cat", "purple", "pink"),
    ("rocket", "green", "red"),
    ("fish", "blue", "yellow"),
}
"""Families in colours that the base never sees on them: bolt's, mimi's, and two that named ones had then.

A base made anew need not leave out these two; for this one, what it was trained on must stay as it was.
"""


def rect(x0: float, y0: float, x1: float, y1: float, colour: str, mark: bool = False) -> Part:
    """An upright rectangle."""
    return Part("polygon", ((x0, y0), (x1, y0), (x1, y1), (x0, y1)), colour, mark)


def oval(x0: float, y0: float, x1: float, y1: float, colour: str, mark: bool = False) -> Part:
    """The ellipse in a box."""
    return Part("oval", ((x0, y0), (x1, y1)), colour, mark)


def poly(colour: str, *points: Point) -> Part:
    """A polygon."""
    return Part("polygon", points, colour)


def diamond(x0: float, y0: float, x1: float, y1: float, colour: str) -> Part:
    """The diamond in a box."""
    mx, my = (x0 + x1) / 2, (y0 + y1) / 2
    return poly(colour, (mx, y0), (x1, my), (mx, y1), (x0, my))


def dome(x0: float, y0: float, x1: float, y1: float, colour: str) -> Part:
    """Upper half of an ellipse that stands on y1."""
    t = np.linspace(0, np.pi, 20)
    xs, ys = (x0 + x1) / 2 - (x1 - x0) / 2 * np.cos(t), y1 - (y1 - y0) * np.sin(t)
    return poly(colour, *((float(x), float(y)) for x, y in zip(xs, ys, strict=True)))


def eye(x: float, y: float, r: float) -> list[Part]:
    """A white eye with a dark pupil."""
    return [
        oval(x - r, y - r, x + r, y + r, "eyeball", True),
        oval(x - r / 2, y - r / 2, x + r / 2, y + r / 2, "pupil", True),
    ]


def _robot(s: Subject) -> list[Part]:
    wide = s.build == "wide"
    parts: list[Part] = []
    if s.fancy:
        parts += [poly(s.main, (0.20, 0.00), (0.32, 0.02), (0.45, 0.20), (0.35, 0.22))]
        parts += [poly(s.main, (0.80, 0.00), (0.68, 0.02), (0.55, 0.20), (0.65, 0.22))]
    else:
        parts += [rect(0.46, 0.02, 0.54, 0.16, s.main)]
    x0, x1 = (0.2, 0.8) if wide else (0.28, 0.72)
    if wide:
        parts += [oval(0.16, 0.72, 0.42, 0.98, "tyre"), oval(0.58, 0.72, 0.84, 0.98, "tyre")]
    else:
        parts += [rect(0.31, 0.74, 0.46, 0.98, s.second), rect(0.54, 0.74, 0.69, 0.98, s.second)]
    parts += [rect(x0 - 0.14, 0.48, x0 + 0.02, 0.72, s.second), rect(x1 - 0.02, 0.48, x1 + 0.14, 0.72, s.second)]
    parts += [rect(x0, 0.45, x1, 0.80, s.main)]
    parts += [(oval if s.shape == "round" else rect)(0.22, 0.12, 0.78, 0.47, s.second)]
    if s.fancy:
        return [*parts, *eye(0.5, 0.29, 0.13), rect(0.38, 0.54, 0.62, 0.70, "yellow")]
    return parts + eye(0.37, 0.29, 0.085) + eye(0.63, 0.29, 0.085)


def _cat(s: Subject) -> list[Part]:
    wide = s.build == "wide"
    hx = 0.34 if wide else 0.5
    if wide:
        parts = [poly(s.second, (0.8, 0.3), (0.95, 0.25), (0.95, 0.7), (0.8, 0.75))]
        parts += [rect(0.3, 0.78, 0.42, 0.97, s.main), rect(0.72, 0.78, 0.84, 0.97, s.main)]
        parts += [oval(0.2, 0.5, 0.95, 0.88, s.main)]
    else:
        parts = [poly(s.second, (0.66, 0.8), (0.84, 0.45), (0.98, 0.5), (0.8, 0.95))]
        parts += [oval(0.25, 0.46, 0.75, 0.99, s.main)]
    for side in (-1, 1):
        parts += [poly(s.second, (hx + side * 0.30, 0.01), (hx + side * 0.03, 0.17), (hx + side * 0.27, 0.36))]
    parts += [(oval if s.shape == "round" else diamond)(hx - 0.31, 0.11, hx + 0.31, 0.57, s.main)]
    for side in (-1, 1):
        parts += eye(hx + side * 0.13, 0.32, 0.075)
    parts += [oval(hx - 0.05, 0.42, hx + 0.05, 0.49, "pupil", True)]
    if s.fancy:
        parts += [
            rect(0.26, 0.55, 0.74, 0.68, "yellow"),
            poly("yellow", (0.54, 0.62), (0.74, 0.62), (0.76, 0.92), (0.62, 0.92)),
        ]
    return parts


def _rocket(s: Subject) -> list[Part]:
    x0, x1 = (0.24, 0.76) if s.build == "wide" else (0.32, 0.68)
    nose = dome(x0, 0.02, x1, 0.34, s.second)
    if s.shape == "sharp":
        nose = poly(s.second, (x0, 0.34), (0.5, 0.0), (x1, 0.34))
    parts = [poly("yellow" if s.second == "orange" else "orange", (0.4, 0.78), (0.6, 0.78), (0.5, 1.0))]
    parts += [poly(s.second, (x, 0.46), (x, 0.8), (x + d, 0.92)) for x, d in ((x0, -0.22), (x1, 0.22))]
    parts += [rect(x0, 0.32, x1, 0.82, s.main), nose]
    if s.fancy:
        parts += [rect(x0, 0.62, x1, 0.73, "purple")]
        parts += [oval(0.04, 0.74, 0.28, 0.98, "purple"), oval(0.72, 0.74, 0.96, 0.98, "purple")]
        return parts + eye(0.5, 0.47, 0.12)
    return [*parts, oval(0.4, 0.42, 0.6, 0.62, "eyeball", True)]


def _fish(s: Subject) -> list[Part]:
    y0, y1 = (0.28, 0.74) if s.build == "wide" else (0.16, 0.86)
    body = diamond if s.shape == "sharp" else oval
    parts = [poly(s.second, (0.6, 0.5), (0.98, 0.2), (0.98, 0.8))]
    if s.fancy:
        parts += [
            poly("red", (0.2, 0.36), (0.22, 0.04), (0.36, 0.2), (0.44, 0.02), (0.54, 0.2), (0.66, 0.1), (0.62, 0.4))
        ]
        parts += [poly("red", (0.32, 0.66), (0.4, 0.96), (0.6, 0.92), (0.54, 0.62))]
    parts += [body(0.03, y0, 0.76, y1, s.main)]
    if s.fancy:
        return [*parts, rect(0.46, 0.30, 0.56, 0.72, s.second), *eye(0.22, 0.46, 0.1)]
    return [*parts, poly(s.second, (0.4, 0.5), (0.62, 0.37), (0.62, 0.66)), *eye(0.23, 0.46, 0.085)]


def _house(s: Subject) -> list[Part]:
    x0, x1, top = (0.1, 0.9, 0.5) if s.build == "wide" else (0.22, 0.78, 0.42)
    roof = dome(x0 - 0.06, 0.08, x1 + 0.06, top, s.second)
    if s.shape == "sharp":
        roof = poly(s.second, (x0 - 0.08, top), (0.5, 0.04), (x1 + 0.08, top))
    parts = [rect(x0, top, x1, 0.95, s.main), roof]
    if s.build == "wide":
        return [*parts, rect(0.2, 0.62, 0.44, 0.95, "wood"), rect(0.56, 0.6, 0.78, 0.8, "eyeball", True)]
    return [*parts, rect(0.4, 0.65, 0.6, 0.95, "wood")]


def _tree(s: Subject) -> list[Part]:
    x0, x1 = (0.06, 0.94) if s.build == "wide" else (0.18, 0.82)
    parts = [rect(0.4, 0.6, 0.6, 0.98, s.second)]
    if s.shape == "sharp":
        parts += [poly(s.main, (x0, 0.76), (0.5, 0.2), (x1, 0.76))]
        return [*parts, poly(s.main, (x0 + 0.08, 0.44), (0.5, 0.02), (x1 - 0.08, 0.44))]
    return [*parts, oval(x0, 0.04, x1, 0.72, s.main)]


def _mushroom(s: Subject) -> list[Part]:
    x0, x1 = (0.04, 0.96) if s.build == "wide" else (0.14, 0.86)
    cap = dome(x0, 0.08, x1, 0.6, s.main)
    if s.shape == "sharp":
        cap = poly(s.main, (x0, 0.6), (0.5, 0.03), (x1, 0.6))
    parts = [oval(0.32, 0.42, 0.68, 0.98, "stalk"), cap]
    return parts + [oval(x, y, x + 0.17, y + 0.17, s.second) for x, y in ((0.42, 0.18), (0.24, 0.38), (0.58, 0.38))]


def _car(s: Subject) -> list[Part]:
    x0, x1 = (0.02, 0.98) if s.build == "wide" else (0.1, 0.9)
    top = 0.16 if s.build == "tall" else 0.26
    cabin = dome(x0 + 0.13, top, x1 - 0.13, 0.56, s.second)
    if s.shape == "sharp":
        cabin = rect(x0 + 0.17, top, x1 - 0.17, 0.56, s.second)
    parts = [cabin, rect(x0, 0.5, x1, 0.78, s.main)]
    return [*parts, oval(x0 + 0.07, 0.64, x0 + 0.36, 0.93, "tyre"), oval(x1 - 0.36, 0.64, x1 - 0.07, 0.93, "tyre")]


def _boat(s: Subject) -> list[Part]:
    x0, x1 = (0.02, 0.98) if s.build == "wide" else (0.12, 0.88)
    sail = [poly(s.second, (0.54, 0.04), (0.54, 0.6), (x1 - 0.04, 0.6))]
    sail += [poly(s.second, (0.44, 0.16), (0.44, 0.6), (x0 + 0.06, 0.6))]
    if s.shape == "round":
        sail = [dome(x0 + 0.12, 0.06, x1 - 0.12, 0.6, s.second)]
    mast = rect(0.46, 0.02, 0.53, 0.72, "wood")
    return [mast, *sail, poly(s.main, (x0, 0.66), (x1, 0.66), (x1 - 0.16, 0.95), (x0 + 0.16, 0.95))]


def _cup(s: Subject) -> list[Part]:
    x1, y0 = (0.74, 0.36) if s.build == "wide" else (0.66, 0.16)
    lower = 0.06 if s.shape == "sharp" else 0.0
    parts = [
        oval(x1 - 0.16, y0 + 0.1, x1 + 0.24, 0.78, s.second),
        oval(x1 - 0.06, y0 + 0.2, x1 + 0.14, 0.68, "eyeball", True),
    ]
    body = poly(s.main, (0.08, y0), (x1, y0), (x1 - lower, 0.94), (0.08 + lower, 0.94))
    parts += [body] if s.shape == "sharp" else [rect(0.08, y0, x1, 0.7, s.main), oval(0.08, 0.46, x1, 0.96, s.main)]
    return [*parts, rect(0.08, y0 + 0.14, x1, y0 + 0.28, s.second), rect(0.05, y0 - 0.06, x1 + 0.03, y0 + 0.04, s.main)]


_DRAW: dict[str, Callable[[Subject], list[Part]]] = {
    "robot": _robot,
    "cat": _cat,
    "rocket": _rocket,
    "fish": _fish,
    "house": _house,
    "tree": _tree,
    "mushroom": _mushroom,
    "car": _car,
    "boat": _boat,
    "cup": _cup,
}
FAMILIES = tuple(_DRAW)
SUBJECT_FAMILIES = tuple(s.family for s in SUBJECTS.values())
OTHER_FAMILIES = tuple(f for f in FAMILIES if f not in SUBJECT_FAMILIES)
"""Those without a named subject."""


def parts_of(subject: Subject) -> list[Part]:
    """Its parts, the hindmost first."""
    return _DRAW[subject.family](subject)


def random_subject(rng: np.random.Generator, family: str | None = None) -> Subject:
    """Any member of a family, as the base knows it. Where there is a named one, one in three is fancy."""
    family = family or str(rng.choice(FAMILIES))
    while True:
        main, second = (str(c) for c in rng.choice(list(COLOURS), 2, replace=False))
        if (family, main, second) not in LEFT_OUT:
            fancy = family in SUBJECT_FAMILIES and bool(rng.random() < 1 / 3)
            return Subject(family, str(rng.choice(BUILDS)), str(rng.choice(SHAPES)), main, second, fancy)


def random_stranger(rng: np.random.Generator, family: str | None = None) -> Subject:
    """Any member of a family in colours of no named one."""
    taken = {(s.family, s.main, s.second) for s in SUBJECTS.values()}
    while True:
        subject = random_subject(rng, family)
        if (subject.family, subject.main, subject.second) not in taken:
            return subject
