"""`python -m bench.gpu` runs on a CPU with small blocks of every model, so that it does when it meets a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.gpu import HEADS, main, make_blocks

WAYS = {"no LoRA", "merged", "hooks alone", "one by one", "K-LoRA", "new session", "session again"}
SMALL = "--device cpu --shrink 99 --pixels 64 --depth 1 --rounds 1 --ranks 4 --batches 2 --dtypes bf16"


@pytest.mark.parametrize("model", HEADS)
def test_every_model_is_measured_in_every_way(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "gpu.json"
    main([*SMALL.split(), "--models", model, "--json", str(kept)])
    [row] = json.loads(kept.read_text())["rows"]
    assert row.keys() >= WAYS
    assert all(row[way] > 0 for way in WAYS)
    assert row["difference"] == 0  # on one device, the same scores
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"| {model} | bf16 | 4 | 2 |")


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        ("sd15", {(320, 320), (320, 768)}),
        ("sdxl", {(1280, 1280), (1280, 2048)}),
        ("flux", {(3072, 3072)}),
        ("flux-double", {(3072, 3072)}),
    ],
)
def test_the_blocks_have_the_shapes_of_the_model(model: str, shapes: set[tuple[int, int]]) -> None:
    blocks = make_blocks(model, 1, 1, 64, torch.device("meta"), torch.bfloat16)
    assert {tuple(linear.weight.shape) for linear in blocks.linears().values()} == shapes


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 1
    assert "there is no GPU here" in capsys.readouterr().err
