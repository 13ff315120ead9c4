"""The training pictures."""

import dataclasses
import itertools

import numpy as np
import pytest

from training.drawing.pictures import SIZE, render
from training.drawing.styles import FLAT, GROUNDS, INKS, NAMED_INKS, NAMED_TEXTURES, STYLES, Style, random_style
from training.drawing.subjects import FAMILIES, LEFT_OUT, PART_COLOURS, SUBJECTS, random_subject


def far(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.abs(picture.astype(int) - colour).sum(-1)


def test_the_same_arguments_give_the_same_picture():
    for subject, style in itertools.product(SUBJECTS.values(), STYLES.values()):
        assert np.array_equal(render(subject, style, "sky", 3), render(subject, style, "sky", 3))


def test_another_seed_moves_the_subject():
    subject, style = SUBJECTS["bolt"], STYLES["woodcut"]
    assert not np.array_equal(render(subject, style, "sky", 3), render(subject, style, "sky", 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_stands_out_from_its_ground(family):
    picture = render(random_subject(np.random.default_rng(0), family), FLAT, "mist", 1)
    assert picture.shape == (SIZE, SIZE, 3)
    assert (far(picture, GROUNDS["mist"]) > 60).mean() > 0.15


@pytest.mark.parametrize("texture", NAMED_TEXTURES)
def test_every_texture_leaves_the_ground_and_enough_of_the_subjects_own_colours(texture):
    subject, seed = SUBJECTS["comet"], 5
    flat, drawn = (render(subject, style, "mist", seed) for style in (FLAT, Style(texture, "black", "none")))
    on_subject = far(flat, GROUNDS["mist"]) > 60
    assert np.array_equal(flat[~on_subject][:50], drawn[~on_subject][:50])
    inked = (far(drawn, INKS["black"]) < 0.7 * far(flat, INKS["black"]))[on_subject].mean()
    assert 0.15 < inked < 0.65


def test_the_base_sees_no_named_style_and_no_colours_left_out():
    rng = np.random.default_rng(1)
    named_styles = {(s.texture, s.ink) for s in STYLES.values()}
    for _ in range(2000):
        subject, style = random_subject(rng), random_style(rng)
        assert (subject.family, subject.main, subject.second) not in LEFT_OUT
        assert (style.texture, style.ink) not in named_styles


def test_two_of_the_named_subjects_are_in_colours_that_the_base_never_sees_on_them():
    colours = {name: (s.family, s.main, s.second) for name, s in SUBJECTS.items()}
    assert {name for name, of in colours.items() if of in LEFT_OUT} == {"bolt", "mimi"}


def test_a_named_style_is_harder_ink_than_any_that_the_base_sees():
    rng = np.random.default_rng(3)
    assert max(random_style(rng).strength for _ in range(100)) < min(s.strength for s in STYLES.values())


def test_named_styles_are_told_apart_by_texture_and_the_contour_is_dark():
    assert [Style("bars", ink, "none").dark for ink in INKS] == [True, True, True, False, False]
    assert {name for name, style in STYLES.items() if style.dark} == {"woodcut"}
    assert len({style.texture for style in STYLES.values()}) == len(STYLES)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_broad_contour_covers_more_than_any_of_the_captions_and_leaves_marks_and_most_colours(subject):
    flat, woodcut = (render(SUBJECTS[subject], style, "mist", 5) for style in (FLAT, STYLES["woodcut"]))
    bold = render(SUBJECTS[subject], Style("flat", "plum", "bold"), "mist", 5)
    on_subject = far(flat, GROUNDS["mist"]) > 60
    covered = {name: far(p, NAMED_INKS["plum"])[on_subject] < 60 for name, p in (("bold", bold), ("heavy", woodcut))}
    assert covered["bold"].mean() < covered["heavy"].mean() < 0.5
    pupils = far(flat, PART_COLOURS["pupil"]) < 10
    assert pupils.any()
    assert np.array_equal(flat[pupils], woodcut[pupils])


def test_a_soft_contour_lies_between_none_and_a_full_one():
    style, subject = STYLES["woodcut"], SUBJECTS["bolt"]
    none, soft, full = (
        render(subject, dataclasses.replace(style, contour_strength=s), "mist", 5).astype(int) for s in (0, 0.5, 1)
    )
    assert np.array_equal(none, render(subject, FLAT, "mist", 5))
    assert np.abs(soft - (none + full) / 2).max() <= 1


def test_the_base_knows_the_parts_of_the_named_subjects_in_other_colours():
    rng = np.random.default_rng(2)
    fancy = {s.family for s in (random_subject(rng) for _ in range(500)) if s.fancy}
    assert fancy == {s.family for s in SUBJECTS.values()}
    assert all(s.fancy for s in SUBJECTS.values())


def test_a_description_names_what_is_drawn():
    assert SUBJECTS["bolt"].words() == "fancy orange and teal robot"
    assert STYLES["engraving"].words() == "with ivory slants"
    assert Style("dots", "black", "thin").words() == "with black dots and thin contour"
    assert FLAT.words() == "flat"
