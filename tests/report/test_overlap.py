"""The overlap of two files in one sentence, as JSON and as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from klora import cli
from klora.cache import ScoreCache
from klora.fusion import interference
from klora.fusion.interference import Interference
from klora.pair import Pair
from klora.report.overlap import Overlap, in_words, overlap_document, overlap_of
from klora.report.overlap_picture import overlap_picture
from klora.report.picture import DARK
from klora.settings import Settings
from tests.support.lora_files import write_lora
from tests.support.pairs import ATTENTION, shapes, write_pair


def part(cosine: float, inside: float = 0.0, style_inside: float | None = None) -> Interference:
    return Interference(cosine, 1.0, 1.0, 0.1, 0.2, inside, inside if style_inside is None else style_inside)


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [
        ({"mid_block": part(0.05, 0.1)}, "mostly apart (cosine +0.05, 10% of the subject inside the style, 10% the"),
        ({"mid_block": part(0.0), "up_blocks.1": part(-0.4)}, "fight in up 1, elsewhere apart (cosine -0.20"),
        ({"mid_block": part(0.5)}, "reinforce each other in mid (cosine +0.50"),
        ({"mid_block": part(0.0, 0.5)}, "use the same directions in mid (cosine +0.00, 50%"),
        # One file inside the other is enough, whichever it is.
        ({"mid_block": part(0.0, 0.5, 0.1)}, "use the same directions in mid (cosine +0.00, 50%"),
        ({"mid_block": part(0.0, 0.1, 0.5)}, "use the same directions in mid (cosine +0.00, 10%"),
        (
            {f"up_blocks.{i}": part(-0.2) for i in range(5)},
            "fight in up 0, up 1, up 2 and 2 more blocks (cosine -0.20",
        ),
        ({}, "not compared: no module of both files has factors"),
    ],
)
def test_a_sentence_says_where_two_files_meet(blocks: dict[str, Interference], sentence: str) -> None:
    assert in_words(Overlap(blocks, 0)).startswith(sentence)


def overlap(subject: Path, style: Path) -> Overlap:
    pair = Pair.open(subject, style, ScoreCache(subject.parent / "cache"))
    return overlap_of(pair, pair.plan(Settings()))


def test_random_files_are_apart_and_a_file_with_itself_is_not(tmp_path: Path) -> None:
    subject, style = write_pair(tmp_path)
    found = overlap(subject, style)
    assert list(found.blocks) == ["down_blocks.0", "mid_block", "up_blocks.1"]
    assert abs(found.whole.cosine) < 0.1
    assert found.whole.modules == len(ATTENTION)
    assert overlap(style, style).whole.cosine == pytest.approx(1.0)
    assert "reinforce each other" in in_words(overlap(style, style))


def test_modules_without_factors_are_left_out_and_said_so(tmp_path: Path) -> None:
    subject = write_lora(tmp_path / "dog.safetensors", shapes(ATTENTION), family="loha", rank=2, seed=1)
    style = write_lora(tmp_path / "ink.safetensors", shapes(ATTENTION), rank=2, seed=2)
    found = overlap_document(overlap(subject, style))
    assert (found["compared"], found["left_out"], found["cosine"]) == (0, len(ATTENTION), None)


def test_a_second_look_computes_nothing_and_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject, style = write_pair(tmp_path)
    first = overlap(subject, style)
    monkeypatch.setattr(interference, "interference", lambda *_, **__: pytest.fail("compared again"))
    assert overlap(subject, style) == first
    with pytest.raises(pytest.fail.Exception):
        overlap(style, subject)


def test_a_damaged_overlap_is_found_anew(tmp_path: Path) -> None:
    subject, style = write_pair(tmp_path)
    first = overlap(subject, style)
    next((tmp_path / "cache").glob("overlap-*")).write_bytes(b"{}")
    with pytest.warns(UserWarning, match="computing it anew"):
        assert overlap(subject, style) == first


def test_the_document_has_numbers_between_their_bounds(tmp_path: Path) -> None:
    found = overlap_document(overlap(*write_pair(tmp_path)))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for numbers in (found, *found["blocks"]):
        assert -1 <= numbers["cosine"] <= 1
        shares = ("output_overlap", "input_overlap", "subject_inside", "style_inside")
        assert all(0 <= numbers[name] <= 1 for name in shares)
    assert sum(block["modules"] for block in found["blocks"]) == found["compared"]


def test_the_command_draws_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pair = [str(path) for path in write_pair(tmp_path)]
    picture = tmp_path / "overlap.png"
    assert cli.main(["analyze", *pair, "--overlap-picture", str(picture)]) == 0
    assert "overlap   mostly apart" in capfd.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["analyze", *pair, "--picture", str(picture), "--overlap-picture", str(picture)]) == 2
    assert "named for two of the results" in capfd.readouterr().err


def test_a_picture_has_room_for_a_name_with_signs_of_formulas(tmp_path: Path) -> None:
    image = overlap_picture(overlap(*write_pair(tmp_path)), "$dog_{1 × ink$")
    assert image.size == (1200, 900)
    assert len(image.getcolors(1 << 20) or []) > 10


def test_a_picture_for_a_dark_page_has_no_white_ground(tmp_path: Path) -> None:
    image = overlap_picture(overlap(*write_pair(tmp_path)), "dog × ink", DARK)
    assert image.getpixel((0, 0)) == image.getpixel((600, 300)) == (0x11, 0x18, 0x27)
