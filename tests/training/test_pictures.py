import itertools

import numpy as np
import pytest

from training import pictures as pic


def test_the_same_arguments_give_the_same_picture():
    for subject, style in itertools.product(pic.SUBJECTS.values(), pic.STYLES.values()):
        assert np.array_equal(pic.render(subject, style, 3), pic.render(subject, style, 3))


def test_another_seed_moves_the_subject():
    subject, style = pic.SUBJECTS["bolt"], pic.STYLES["neon"]
    assert not np.array_equal(pic.render(subject, style, 3), pic.render(subject, style, 4))


@pytest.mark.parametrize("size", [16, 32, 64])
def test_a_picture_has_the_size_that_was_asked_for(size):
    picture = pic.render(pic.SUBJECTS["mimi"], pic.STYLES["popart"], 0, size)
    assert picture.shape == (size, size, 3)
    assert picture.dtype == np.uint8


@pytest.mark.parametrize("family", pic.FAMILIES)
def test_every_family_stands_out_from_its_background(family):
    rng = np.random.default_rng(0)
    subject = pic.random_subject(rng, family)
    picture = pic.render(subject, pic.Style("plain", "black", "black"), 1).astype(int)
    assert (np.abs(picture - pic.COLOURS["black"]).sum(-1) > 60).mean() > 0.1


def test_every_pattern_uses_both_of_its_colours():
    for pattern in set(pic.PATTERNS) - {"plain"}:
        corner = pic.render(pic.SUBJECTS["comet"], pic.Style(pattern, "black", "yellow"), 0)[:10]
        for colour in ("black", "yellow"):
            assert (np.abs(corner.astype(int) - pic.COLOURS[colour]).sum(-1) < 30).any(), (pattern, colour)


def test_generic_subjects_and_styles_are_never_the_named_ones():
    rng = np.random.default_rng(1)
    named_subjects = {(s.family, s.main, s.second) for s in pic.SUBJECTS.values()}
    named_styles = {(s.pattern, frozenset((s.ground, s.figure))) for s in pic.STYLES.values()}
    for _ in range(2000):
        subject = pic.random_subject(rng)
        style = pic.random_style(rng, subject)
        assert not subject.special
        assert (subject.family, subject.main, subject.second) not in named_subjects
        assert (style.pattern, frozenset((style.ground, style.figure))) not in named_styles
        assert {style.ground, style.figure}.isdisjoint({subject.main, subject.second}) or style.tone == "hollow"


def test_a_description_names_what_is_drawn():
    assert pic.describe_subject(pic.SUBJECTS["bolt"]) == "tall sharp orange and cyan robot"
    assert pic.describe_style(pic.STYLES["parchment"]) == "faded with brown outline on cream and brown stripes"
    assert pic.describe_style(pic.Style("plain", "red", "red")) == "on red"
