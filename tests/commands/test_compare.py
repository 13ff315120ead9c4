"""`klora compare`: what is on the sheet, in the table and on the terminal."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from klora import cli
from tests.support.lora_files import write_lora
from tests.support.studies import write_model


@pytest.fixture(scope="module")
def generator_args(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments of `klora compare` for a tiny random pipeline and a pair that fits it."""
    folder = tmp_path_factory.mktemp("generator_args")
    attention = write_model(folder)
    subject = write_lora(folder / "dog.safetensors", attention, "kohya", rank=4, seed=1)
    style = write_lora(folder / "ink.safetensors", attention, "peft", rank=8, seed=2)
    pair = ("--subject", str(subject), "--style", str(style))
    return ("compare", "--model", str(folder / "model"), *pair, "--steps", "1", "--size", "32")


def test_rows_are_policies_and_what_cannot_run_is_listed_with_its_reason(
    generator_args: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("--policies", "k-lora,composite,b-lora", "--seeds", "2", "--seed", "5", "--prompt", "a dog")
    assert cli.main([*generator_args, *words, "--out", str(tmp_path)]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("k-lora: 1 forward per step, ")
    assert lines[1].startswith("composite: 2 forwards per step, ")
    assert lines[2].startswith("b-lora: cannot run: ")
    assert "SDXL" in lines[2]
    assert lines[3:] == [f"contact sheet: {tmp_path / 'contact-sheet.png'}", f"times: {tmp_path / 'times.csv'}"]
    assert "composite, picture 2 of 2, 2 forwards per step" in err

    rows = list(csv.DictReader((tmp_path / "times.csv").open()))
    assert [(row["policy"], row["seed"], row["forwards_per_step"]) for row in rows] == [
        ("k-lora", "5", "1"),
        ("k-lora", "6", "1"),
        ("composite", "5", "2"),
        ("composite", "6", "2"),
        ("b-lora", "", ""),
    ]
    assert all(float(row["seconds_per_image"]) > 0 for row in rows[:4])
    assert "SDXL" in rows[4]["note"]
    for row in rows[:4]:
        with Image.open(tmp_path / row["picture"]) as image:
            facts = json.loads(image.text["klora"])
        assert (facts["settings"]["policy"], facts["seed"], facts["prompt"]) == (
            row["policy"],
            int(row["seed"]),
            "a dog",
        )
    with Image.open(tmp_path / "contact-sheet.png") as sheet:
        assert sheet.height > 2 * 128
        assert sheet.width > 2 * 128


def test_without_a_prompt_the_names_of_the_files_are_painted(
    generator_args: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*generator_args, "--policies", "direct", "--seeds", "1", "--out", str(tmp_path)]) == 0
    assert "“a dog in ink style”" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--policies", "best"], "--policies"),
        (["--policies", "b-lora"], "SDXL"),
        (["--seeds", "0"], "--seeds"),
        (["--subject", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--model", "nowhere"], "nowhere"),
        (["--policy", "direct"], "--policy"),
        (["--demo"], "--model"),
        (["--alpha", "x"], "--alpha"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    generator_args: tuple[str, ...], words: list[str], named: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = cli.main([*generator_args, "--prompt", "a", *words, "--out", str(tmp_path)])
    err = capfd.readouterr().err
    assert code == 2
    assert named in err
    assert err.startswith("klora: error: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_it_needs_a_model_or_the_demo(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--prompt", "a dog"]) == 2
    assert "--model: is needed, or --demo" in capfd.readouterr().err
