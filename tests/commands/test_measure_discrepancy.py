"""`klora measure-discrepancy`: EST-LoRA's d, of probe pictures or of pictures that are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from klora import cli
from tests.support.lora_files import write_lora
from tests.support.studies import write_encoders, write_model


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoders(tmp_path_factory.mktemp("encoders"))[1]


def test_two_probe_pictures_are_made_kept_and_compared(
    tmp_path: Path, dino: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    attention = write_model(tmp_path)
    subject = write_lora(tmp_path / "dog.safetensors", attention, "kohya", rank=4, seed=1)
    style = write_lora(tmp_path / "ink.safetensors", attention, "peft", rank=8, seed=2)
    words = ["--model", str(tmp_path / "model"), "--prompt", "a dog", "--steps", "1", "--size", "32"]
    out = tmp_path / "probe"
    words += ["--dino-model", str(dino), "--out", str(out), "--device", "cpu"]
    assert cli.main(["measure-discrepancy", str(subject), str(style), *words]) == 0
    measured = float(capfd.readouterr().out)
    assert sorted(path.name for path in out.iterdir()) == ["probe-style.png", "probe-subject.png"]
    refs = ["--subject-refs", str(out / "probe-subject.png"), "--style-refs", str(out / "probe-style.png")]
    assert cli.main(["measure-discrepancy", *refs, "--dino-model", str(dino), "--device", "cpu"]) == 0
    assert float(capfd.readouterr().out) == measured
    assert -1 <= measured <= 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--subject-refs", "a.png"], "--subject-refs: goes with --style-refs"),
        (["--style-refs", "a.png"], "goes with"),
        ([], "SUBJECT: is needed"),
        (["a", "b", "--model", "m"], "--prompt: is needed"),
    ],
)
def test_what_is_missing_is_named(words: list[str], named: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["measure-discrepancy", *words]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert named in err
    assert len(err.splitlines()) == 1
