"""`klora demo`, with a random model in place of the trained one."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from PIL import Image

from klora import cli
from klora.commands import demo
from klora.demo import catalogue
from klora.errors import KloraError
from klora.fusion.policies import POLICIES
from tests.support.studies import write_demo_home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_home(tmp_path_factory.mktemp("home"))


def test_subjects_and_styles_are_paired_with_the_prompts_of_each(home: Path) -> None:
    first, second = catalogue.demo_pairs(catalogue.read_catalogue(home), home)
    assert (first.subject, first.style, second.subject, second.style) == ("bolt", "neon", "mimi", "dots")
    assert second.prompts == {
        "subject": "a sbu cat",
        "style": "a cat in szn style",
        "both": "a sbu cat in szn style",
    }


def test_it_writes_a_sheet_and_a_map_and_says_where(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalogue, "HOME", home)
    out = tmp_path / "new" / "folder"
    assert cli.main(["demo", "--out", str(out)]) == 0
    sheet, chart = out / "contact-sheet.png", out / "selection-map.png"
    assert capfd.readouterr().out.splitlines() == [f"contact sheet: {sheet}", f"selection map: {chart}"]
    with Image.open(sheet) as image:
        cells = len(demo.COLUMNS) * len(demo.SEEDS)
        assert image.width > cells * 100
    with Image.open(chart) as image:
        assert image.format == "PNG"
    assert sorted(path.name for path in out.iterdir()) == [sheet.name, chart.name]


def test_alone_means_that_the_other_lora_has_no_say(home: Path) -> None:
    import torch

    from klora.api import fuse
    from klora.generation.pipeline import load_pipeline
    from tests.support.pipelines import run as generate

    pipe = load_pipeline(str(home / "model"), torch.float32)
    subject, *styles = (home / f"{name}.safetensors" for name in ("bolt", "neon", "dots"))
    alone, merged = [], []
    for style in styles:
        with fuse(pipe, subject, style, **demo.COLUMNS[0].settings):
            alone.append(generate(pipe))
        with fuse(pipe, subject, style, **demo.COLUMNS[2].settings):
            merged.append(generate(pipe))
    assert torch.equal(*alone)
    assert not torch.equal(*merged)


def test_an_installation_without_the_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(KloraError, match="not in this installation"):
        catalogue.read_catalogue(tmp_path)


def test_the_demo_is_compared_by_names_of_its_own(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalogue, "HOME", home)
    words = ("compare", "--demo", "--policies", "k-lora,direct", "--seeds", "1", "--out", str(tmp_path))
    assert cli.main([*words, "--style", "ink"]) == 0
    for row in csv.DictReader((tmp_path / "times.csv").open()):
        with Image.open(tmp_path / row["picture"]) as image:
            assert image.text["parameters"].startswith("a sbu robot in szn style\nSteps: 2, Sampler: DDIM")
            assert "K-LoRA subject: bolt, K-LoRA style: ink" in image.text["parameters"]
    several = ("--subject", "mimi:0.5", "bolt", "--style", "ink")
    assert cli.main([*words, *several, "--out", str(tmp_path / "several")]) == 0
    for path in (tmp_path / "several").glob("0*.png"):
        with Image.open(path) as image:
            assert image.text["parameters"].startswith("a sbu cat in szn style")
            assert "K-LoRA subject: mimi*0.5 + bolt, K-LoRA style: ink" in image.text["parameters"]
    assert cli.main([*words, "--style", "oil"]) == 2
    assert "oil: is not in the demo; choose neon, dots, ink" in capfd.readouterr().err


def test_the_demo_is_evaluated_by_its_judge_alone(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalogue, "HOME", home)
    words = ("--policies", "k-lora,direct", "--seeds", "1", "--steps", "1", "--out", str(tmp_path))
    assert cli.main(["evaluate", "--demo", *words]) == 0
    assert "| method | subject recognised % | style recognised % | both recognised %" in capfd.readouterr().out
    table = list(csv.DictReader((tmp_path / "pictures.csv").open()))
    assert [(row["subject"], row["style"]) for row in table if row["method"] == "direct"] == [
        (subject, style) for subject in ("bolt", "mimi") for style in ("neon", "dots", "ink")
    ]
    for row in table:
        rates = [float(row[f"{name}_recognised"]) for name in ("subject", "style", "both")]
        assert rates[2] == rates[0] * rates[1] in (0.0, 1.0)
        for name in ("subject", "style"):
            probability = float(row[f"{name}_probability"])
            assert 0 <= probability <= 1
            # What is named is named for its probability.
            assert probability > 0.5 or not float(row[f"{name}_recognised"])


def test_pairs_that_nothing_was_chosen_on_are_evaluated_by_themselves(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from klora.evaluation.demo_study import demo_study

    monkeypatch.setattr(catalogue, "HOME", home)
    pairs = [(pair.subject.name, pair.style.name) for pair in demo_study(held_out=True)]
    assert pairs == [("mimi", "dots"), ("mimi", "ink")]
    assert cli.main(["evaluate", "study", "--model", "m", "--held-out"]) == 2
    assert "--held-out: says which pairs of --demo" in capfd.readouterr().err


def test_every_method_of_the_demo_evaluation_is_one() -> None:
    from klora.evaluation.demo_study import METHODS
    from klora.generation.methods import read_methods
    from klora.settings import Settings

    methods = read_methods(METHODS, Settings())
    assert {method.settings.policy for method in methods} == set(POLICIES)
    assert [method.name for method in methods][:3] == ["k-lora:scale=s", "k-lora:scale=s*", "direct:preset=1,1"]
