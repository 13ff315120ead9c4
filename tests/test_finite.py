"""NaN in a file is told once, by its key, while the file is scored."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from klora.cache import ScoreCache
from klora.errors import LoraValueError
from klora.lora.deltas import Delta
from klora.lora.file import LoraFile
from klora.lora.side import Side
from tests.support.lora_files import write_lora

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TO_Q, FF = f"{BLOCK}.attn1.to_q", f"{BLOCK}.ff.net.2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize("family", ["lora", "loha", "lokr", "dora", "full"])
@pytest.mark.parametrize("alpha", [3.0, 0.0])
def test_nan_anywhere_in_a_file_is_told_by_its_key(tmp_path: Path, folder: Path, family: str, alpha: float) -> None:
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    shapes = {TO_Q: (48, 40), FF: (24, 16), text: (24, 16)}
    path = write_lora(tmp_path / "bad.safetensors", shapes, family=family, alpha=alpha)
    tensors = load_file(path)
    for key in [key for key in tensors if not key.endswith("alpha")]:
        damaged = {**tensors, key: tensors[key].clone()}
        damaged[key].view(-1)[-1] = float("nan")
        save_file(damaged, path)
        with pytest.raises(LoraValueError) as error:
            ScoreCache(folder).scores(Side.alone(LoraFile.open(path)))
        assert error.value.key == key


def test_a_file_whose_scores_are_kept_is_not_looked_at_again(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = LoraFile.open(write_lora(tmp_path / "cat.safetensors", {TO_Q: (48, 40)}, rank=4))
    ScoreCache(folder).scores(Side.alone(file))
    assert file.finite
    again = LoraFile.open(file.path)
    assert not again.finite
    monkeypatch.setattr(Delta, "check_finite", lambda *_: pytest.fail("looked at again"))
    ScoreCache(folder).scores(Side.alone(again))
    again.check_finite()
    assert again.finite
