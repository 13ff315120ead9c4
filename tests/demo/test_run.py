"""`klora demo`, with a random model in place of the trained one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from klora import cli
from klora.demo import run
from klora.errors import KloraError
from tests.support.lora_files import write_lora
from tests.support.models import module_shapes
from tests.support.pipelines import sd_pipeline

FAMILIES = {"bolt": "robot", "mimi": "cat"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for the installed `klora/demo`."""
    folder = tmp_path_factory.mktemp("home")
    pipe = sd_pipeline(folder / "tokenizer")
    pipe.save_pretrained(folder / "model")
    attention = {name: shape for name, shape in module_shapes(pipe.unet).items() if ".attn" in name}
    subjects, styles = {}, {}
    for seed, (name, family) in enumerate(FAMILIES.items()):
        write_lora(folder / f"{name}.safetensors", attention, "kohya", seed=seed)
        subjects[name] = {"file": f"{name}.safetensors", "family": family, "prompt": f"a sbu {family}"}
    for seed, name in enumerate(["neon", "dots", "ink"]):
        write_lora(folder / f"{name}.safetensors", attention, "peft", seed=10 + seed)
        styles[name] = {"file": f"{name}.safetensors", "prompt": "a {family} in szn style"}
    catalogue = {
        "model": "model",
        "recommended": {"steps": 2, "guidance_scale": 4.0},
        "prompt": "a sbu {family} in szn style",
        "subjects": subjects,
        "styles": styles,
    }
    (folder / "catalogue.json").write_text(json.dumps(catalogue))
    return folder


def test_subjects_and_styles_are_paired_with_the_prompts_of_each(home: Path) -> None:
    first, second = run.demo_pairs(run.read_catalogue(home), home)
    assert (first.subject, first.style, second.subject, second.style) == ("bolt", "neon", "mimi", "dots")
    assert second.prompts == {
        "subject": "a sbu cat",
        "style": "a cat in szn style",
        "both": "a sbu cat in szn style",
    }


def test_it_writes_a_sheet_and_a_map_and_says_where(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "HOME", home)
    out = tmp_path / "new" / "folder"
    assert cli.main(["demo", "--out", str(out)]) == 0
    sheet, chart = out / "contact-sheet.png", out / "selection-map.png"
    assert capfd.readouterr().out.splitlines() == [f"contact sheet: {sheet}", f"selection map: {chart}"]
    with Image.open(sheet) as image:
        cells = len(run.METHODS) * len(run.SEEDS)
        assert image.width > cells * 100
    with Image.open(chart) as image:
        assert image.format == "PNG"
    assert sorted(path.name for path in out.iterdir()) == [sheet.name, chart.name]


def test_alone_means_that_the_other_lora_has_no_say(home: Path) -> None:
    import torch

    from klora.api import fuse
    from klora.generate import load_pipeline
    from tests.support.pipelines import run as paint

    pipe = load_pipeline(str(home / "model"), torch.float32)
    subject, *styles = (home / f"{name}.safetensors" for name in ("bolt", "neon", "dots"))
    alone, merged = [], []
    for style in styles:
        with fuse(pipe, subject, style, **run.METHODS[0].settings):
            alone.append(paint(pipe))
        with fuse(pipe, subject, style, **run.METHODS[2].settings):
            merged.append(paint(pipe))
    assert torch.equal(*alone)
    assert not torch.equal(*merged)


def test_an_installation_without_the_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(KloraError, match="not in this installation"):
        run.read_catalogue(tmp_path)
