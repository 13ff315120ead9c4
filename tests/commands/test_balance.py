"""`klora balance` and `klora generate --share find`: what they say, write and leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from klora import cli
from klora.balance.search import SHARES
from klora.demo import catalogue
from tests.support.balances import look_at_fewer
from tests.support.lora_files import write_lora
from tests.support.studies import write_model

QUICK = ("--steps", "5", "--size", "32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments for a tiny random pipeline and a pair that fits it."""
    folder = tmp_path_factory.mktemp("model")
    attention = write_model(folder)
    subject = write_lora(folder / "dog.safetensors", attention, "kohya", rank=4, seed=1)
    style = write_lora(folder / "ink.safetensors", attention, "peft", rank=8, seed=2)
    return ("--model", str(folder / "model"), "--subject", str(subject), "--style", str(style), "--prompt", "a dog")


def test_the_demo_gives_a_share_and_its_candidates_as_json_and_nothing_else_on_stdout(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("balance", "--demo", "bolt", "engraving", "--json", "-", "--out", str(tmp_path), "--steps", "5")
    assert cli.main(words) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert [candidate["share"] for candidate in found["candidates"]] == list(SHARES)
    assert found["share"] in SHARES
    for candidate in found["candidates"]:
        assert set(candidate) == {"share", "subject", "style"}
    first, last = found["candidates"][0], found["candidates"][-1]
    assert first["subject"] < last["subject"]
    assert first["style"] > last["style"]
    assert "takes as long as 11 pictures" in err
    with Image.open(tmp_path / "balance.png") as sheet:
        assert sheet.width > len(SHARES) * 64


def test_what_was_found_is_said_in_words(
    model: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = look_at_fewer(monkeypatch)
    code = cli.main(("balance", *model, *QUICK, "--out", str(tmp_path), "--json", str(tmp_path / "found.json")))
    out, err = capfd.readouterr()
    if code:  # random LoRAs may be nowhere to be seen
        assert "LoRA finds nothing of its own" in err
        return
    *tried, taken, sheet = out.splitlines()
    assert [line.partition(":")[0] for line in tried] == [f"share {share:g}" for share in few]
    assert all("subject kept " in line for line in tried)
    assert taken == f"take --share {json.loads((tmp_path / 'found.json').read_text())['share']:g}"
    assert sheet == f"sheet: {tmp_path / 'balance.png'}"


def test_a_picture_is_made_with_the_share_that_was_found(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = look_at_fewer(monkeypatch)
    known = catalogue.read_catalogue(catalogue.HOME)
    pair = catalogue.demo_pair(known, catalogue.HOME, "mimi", "woodcut")
    subject, style = map(str, pair.files)
    files = ("--model", str(catalogue.HOME / known["model"]), "--subject", subject, "--style", style)
    words = ("--prompt", pair.prompts["both"], "--steps", "5", "--share", "find", "--out", str(tmp_path))
    assert cli.main(("generate", *files, *words)) == 0
    out, err = capfd.readouterr()
    with Image.open(out.strip()) as image:
        share = json.loads(image.text["klora"])["settings"]["share"]
    assert share in few
    assert f"klora: take --share {share:g}" in err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("balance", "--demo", "bolt"), "--demo"),
        (("balance", "--demo", "bolt", "nobody"), "nobody"),
        (("balance", "--demo", "--subject", "x"), "--demo"),
        (("balance", "--model", "x", "--subject", "y", "--style", "z"), "--prompt"),
        (("balance", "--demo", "--policy", "direct"), "direct"),
        (("balance", "--demo", "--share", "0.5"), "--share"),
    ],
)
def test_what_cannot_be_asked_is_an_error_on_one_line(
    words: tuple[str, ...], named: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main((*words, "--out", str(tmp_path))) == 2
    out, err = capfd.readouterr()
    assert not out
    assert len(err.splitlines()) == 1
    assert named in err
