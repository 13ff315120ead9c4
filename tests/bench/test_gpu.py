"""`python -m bench.gpu` runs on a CPU with small blocks of every model, so that it does when it meets a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bench.gpu
from bench.blocks import HEADS, WAYS, make_blocks, operations
from bench.gpu import main
from bench.model import open_pair, write_pair
from bench.picture import WAYS as PICTURES

SMALL = "--device cpu --shrink 199 --pixels 64 --depth 1 --rounds 1 --steps 1 --ranks 4 --batches 2 --dtypes bf16"


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    kept = tmp_path / "gpu.json"
    main([*arguments, *SMALL.split(), "--json", str(kept)])
    return json.loads(kept.read_text())


@pytest.mark.parametrize("model", HEADS)
def test_every_model_is_measured_in_every_way(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [row] = run(tmp_path, "blocks", "--models", model)["blocks"]
    assert row["seconds"].keys() == {*WAYS, "new session", "session again"}
    assert all(value > 0 for value in row["seconds"].values())
    assert row["operations"].keys() == {*WAYS}
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"| {model} | bf16 | 4 | 2 |")


@pytest.mark.parametrize(("model", "saved"), [("sd15", 2 + 1), ("sdxl", 2 + 1), ("flux", 2), ("flux-double", 2 + 2)])
def test_a_module_costs_two_operations_and_modules_of_one_input_share_the_first(
    model: str, saved: int, tmp_path: Path
) -> None:
    cpu = torch.device("cpu")
    blocks = make_blocks(model, 1, 1, 64, cpu, torch.bfloat16, shrink=99)
    linears = blocks.linears()
    pair = open_pair(write_pair(tmp_path, {name: tuple(layer.weight.shape) for name, layer in linears.items()}, 4))
    counts = operations(blocks, pair, cpu)
    assert counts["no LoRA"] == counts["merged"] == counts["hooks alone"]
    assert counts["one by one"] == counts["merged"] + 2 * len(linears)
    # q, k and v of self-attention; k and v of cross-attention, or all three of the text's in FLUX.
    assert counts["K-LoRA"] == counts["one by one"] - saved


def test_a_pair_is_scored_on_both_devices_with_the_same_sums(tmp_path: Path) -> None:
    [row] = run(tmp_path, "scoring")["scoring"]
    assert row["seconds"].keys() == {"on the CPU", "on the device", "again", "files to plan"}
    assert row["modules"] == 4
    assert 0 < row["difference"] < 1e-6


def test_whole_pictures_are_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [row] = run(tmp_path, "pictures")["pictures"]
    assert row["seconds"].keys() == set(PICTURES)
    assert row["parts"]["K-LoRA, first"]["forwards"] > 0
    assert "| K-LoRA, second |" in capsys.readouterr().out


def test_what_was_measured_before_an_error_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setitem(bench.gpu.MEASUREMENTS, "pictures", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run(tmp_path, "scoring", "pictures")
    assert json.loads((tmp_path / "gpu.json").read_text())["scoring"]


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


def test_what_cannot_be_measured_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["blocks", "videos"])
    assert ended.value.code == 2
    assert "videos cannot be measured" in capsys.readouterr().err
