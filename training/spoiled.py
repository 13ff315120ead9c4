"""Labelled pictures for the judge: right ones, near misses, and ones that nobody should put a name to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from training.drawing.pictures import SIZE, render
from training.drawing.styles import CONTOURS, GROUNDS, STYLES, Style, random_style
from training.drawing.subjects import FAMILIES, SUBJECTS, Subject, random_stranger

SUBJECT_NAMES = (*SUBJECTS, *FAMILIES)
"""The named subjects, then the families for any other member of them."""
OTHER = "other"
STYLE_NAMES = (*STYLES, "flat", OTHER)
"""The named styles, then what has no texture, and any other texture."""

VISIBLE = 30
"""A difference of two pixels, in one of their channels of 0 to 255, that can be seen."""
ANY = "any"
"""A label that asks nothing: the axis is not what the picture is about."""


@dataclass(frozen=True)
class Example:
    """A picture with what the judge should say: a name, None for "cannot tell", or `ANY`."""

    image: np.ndarray
    subject: str | None
    style: str | None


def some_subject(rng: np.random.Generator, named: float = 0.45) -> tuple[Subject, str]:
    """A subject and its name on the judge's list. One in four is a near miss of a named one."""
    if rng.random() >= named:
        subject = random_stranger(rng)
        return subject, subject.family
    name = str(rng.choice(list(SUBJECTS)))
    subject = SUBJECTS[name]
    kind = rng.random()
    if kind < 0.13:  # its parts in other colours
        return dataclasses.replace(random_stranger(rng, subject.family), fancy=True), subject.family
    if kind < 0.26:  # its colours without its parts
        return dataclasses.replace(subject, fancy=False), subject.family
    return subject, name


def _alike(style: Style, named: Style) -> bool:
    """Whether nobody can tell them apart: by an ink of the same tone, or a contour that is a little narrower."""
    if style.texture != named.texture or style.dark != named.dark:
        return False
    return style.texture != "flat" or style.contour == "bold"


def some_style(rng: np.random.Generator, named: float = 0.45) -> tuple[Style, str]:
    """A style and its name. It is known by texture and tone, in soft ink too, and by its contour if it is flat.

    Other styles with the texture of a named one are in ink of the other tone: nobody can tell navy from black.
    """
    if rng.random() >= named:
        style = random_style(rng)
        while any(_alike(style, named) for named in STYLES.values()):
            style = random_style(rng)
        return style, "flat" if style.texture == "flat" else OTHER
    name = str(rng.choice(list(STYLES)))
    style, strength, contour = STYLES[name], rng.uniform(0.5, 0.95), str(rng.choice(CONTOURS))
    if style.texture == "flat":
        return dataclasses.replace(style, contour_strength=strength), name
    contour = contour if rng.random() < 0.3 else style.contour
    return dataclasses.replace(style, strength=strength, contour=contour), name


def _ground(rng: np.random.Generator) -> str:
    return str(rng.choice(list(GROUNDS)))


def clean(rng: np.random.Generator) -> Example:
    """A right picture."""
    (subject, name), (style, look) = some_subject(rng), some_style(rng)
    return Example(render(subject, style, _ground(rng), int(rng.integers(2**31))), name, look)


def _warp(image: np.ndarray, amplitude: float, rng: np.random.Generator) -> np.ndarray:
    """Move pixels along a smooth random field."""
    coarse = rng.normal(size=(2, 6, 6)).astype(np.float32)
    fields = [np.asarray(Image.fromarray(f).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for f in coarse]
    y, x = np.mgrid[:SIZE, :SIZE]
    rows = np.clip(np.rint(y + fields[0] * amplitude), 0, SIZE - 1).astype(int)
    columns = np.clip(np.rint(x + fields[1] * amplitude), 0, SIZE - 1).astype(int)
    return image[rows, columns]


def _blur(image: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def _noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return np.clip(image + rng.normal(0, sigma, image.shape), 0, 255).astype(np.uint8)


def _clouds(rng: np.random.Generator) -> np.ndarray:
    coarse = Image.fromarray(rng.integers(0, 256, (*rng.integers(2, 17, 2), 3), dtype=np.uint8))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def join_halves(one: np.ndarray, two: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two pictures along a straight line, with between 0.4 and 0.6 of what tells them apart on either side."""
    angle, share = rng.uniform(0, np.pi), rng.uniform(0.4, 0.6)
    y, x = np.mgrid[:SIZE, :SIZE]
    along = x * np.cos(angle) + y * np.sin(angle)
    apart = np.abs(one.astype(int) - two).max(2)
    line = np.quantile(along[apart > VISIBLE], share)
    return np.where((along > line)[..., None], one, two)


def smeared(rng: np.random.Generator) -> Example:
    """Too soft or too noisy to see how it is drawn; or so bent, or so clouded, that it shows nothing."""
    one, kind = clean(rng), int(rng.integers(4))
    if kind == 0:
        return Example(_blur(one.image, rng.uniform(2.2, 5)), ANY, None)
    if kind == 1:
        return Example(_noise(one.image, rng.uniform(150, 230), rng), ANY, None)
    if kind == 2:
        return Example(_blur(_warp(one.image, rng.uniform(10, 16), rng), rng.uniform(1.5, 3)), None, None)
    clouds = _clouds(rng)
    return Example(np.uint8(clouds * 0.8 + one.image * 0.2) if rng.random() < 0.5 else clouds, None, None)


def mixed(rng: np.random.Generator) -> Example:
    """Two pictures of different families and styles, one shining through the other."""
    one, two = clean(rng), clean(rng)
    while one.subject == two.subject or one.style == two.style:
        two = clean(rng)
    share = rng.uniform(0.4, 0.6)
    return Example(np.uint8(one.image * share + two.image * (1 - share)), None, None)


def half_drawn(rng: np.random.Generator) -> Example:
    """One half of a subject in one style and one in another, or one half of one subject and one of another."""
    (subject, name), (style, look) = some_subject(rng), some_style(rng, 0.7)
    ground, seed = _ground(rng), int(rng.integers(2**31))
    image = render(subject, style, ground, seed)
    if rng.random() < 0.6:
        other, other_look = some_style(rng)
        while other_look == look or other.texture == style.texture != "flat":
            other, other_look = some_style(rng)
        return Example(join_halves(image, render(subject, other, ground, seed), rng), name, None)
    other_subject, _ = some_subject(rng)
    while other_subject.family == subject.family:
        other_subject, _ = some_subject(rng)
    return Example(join_halves(image, render(other_subject, style, ground, seed), rng), None, look)


def spoil_a_little(example: Example, rng: np.random.Generator) -> Example:
    """What a good sample may differ in from a render: a shift, a soft edge, a slight cast, grain, a small dent."""
    image = np.roll(example.image, tuple(rng.integers(-2, 3, 2)), (0, 1))
    image = _warp(image, rng.uniform(0, 1.2), rng) if rng.random() < 0.5 else image
    image = _blur(image, rng.uniform(0.2, 0.8)) if rng.random() < 0.4 else image
    cast = image * rng.uniform(0.9, 1.1, 3) + rng.uniform(-12, 12, 3)
    image = np.clip(cast + rng.normal(0, rng.uniform(0, 12), image.shape), 0, 255).astype(np.uint8)
    return dataclasses.replace(example, image=image)


SPOILED = {"smeared": smeared, "mixed": mixed, "half-drawn": half_drawn}
