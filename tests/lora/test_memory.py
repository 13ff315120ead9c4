"""State dicts in memory: a LoRA like a file's, with a copy of its own of what it was given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from klora.cache import ScoreCache
from klora.errors import LoraFileError, LoraValueError
from klora.lora.file import LoraFile
from klora.pair import SAME_FILE, Pair, Pairs
from klora.settings import Settings
from tests.support.lora_files import write_lora

SHAPES = {f"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_{part}": (16, 16) for part in "qkv"}
SHAPES |= {"mid_block.resnets.0.conv1": (16, 16, 3, 3)}
FLUX = {f"single_transformer_blocks.1.attn.to_{part}": (12, 12) for part in "qkv"}
FLUX |= {"single_transformer_blocks.1.proj_mlp": (48, 12)}


@pytest.mark.parametrize("family", ["lora", "loha", "lokr"])
def test_a_state_dict_is_read_as_its_file_is(tmp_path: Path, family: str) -> None:
    path = write_lora(tmp_path / "x.safetensors", SHAPES, family=family, alpha=2.0, dtype=torch.bfloat16)
    file, memory = LoraFile.open(path), LoraFile.open(load_file(path))
    assert list(memory.modules) == list(file.modules)
    for name, delta in memory.modules.items():
        assert (delta.rank, delta.alpha) == (file.modules[name].rank, file.modules[name].alpha)
        assert torch.equal(delta.matrix(), file.modules[name].matrix())


def test_a_fused_weight_in_memory_is_split_by_rows(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "x.safetensors", FLUX, "kohya")
    file, memory = LoraFile.open(path), LoraFile.open(load_file(path))
    assert memory.architecture == "FLUX"
    assert all(torch.equal(delta.matrix(), file.modules[name].matrix()) for name, delta in memory.modules.items())


def test_what_is_done_with_a_state_dict_afterwards_changes_nothing(tmp_path: Path) -> None:
    tensors = load_file(write_lora(tmp_path / "x.safetensors", SHAPES))
    memory = LoraFile.open(tensors)
    before = {name: delta.matrix() for name, delta in memory.modules.items()}
    for tensor in tensors.values():
        tensor.fill_(torch.nan)
    assert all(torch.equal(delta.matrix(), before[name]) for name, delta in memory.modules.items())


def test_state_dicts_are_known_again_by_what_they_hold(tmp_path: Path) -> None:
    first, second = (load_file(write_lora(tmp_path / f"{seed}.safetensors", SHAPES, seed=seed)) for seed in (1, 2))
    pairs, cache = Pairs(), ScoreCache(tmp_path / "cache")
    pair = pairs.open(first, second, cache)
    assert pairs.open({key: tensor.clone() for key, tensor in first.items()}, second, cache) is pair
    next(iter(first.values())).add_(1)
    assert pairs.open(first, second, cache) is not pair


def test_a_state_dict_and_a_file_are_planned_as_two_files_are(tmp_path: Path) -> None:
    one, two = (write_lora(tmp_path / f"{seed}.safetensors", SHAPES, seed=seed) for seed in (1, 2))
    cache = ScoreCache(tmp_path / "cache")
    wanted = Pair.open(one, two, cache).plan(Settings())
    for _ in range(2):
        plan = Pair.open(load_file(one), two, cache).plan(Settings())
        assert [module.rho for module in plan.modules] == [module.rho for module in wanted.modules]
    assert Pair.open(load_file(one), load_file(one), cache).plan(Settings()).warnings[0] == SAME_FILE


def test_errors_name_the_side_and_the_key(tmp_path: Path) -> None:
    tensors = load_file(write_lora(tmp_path / "x.safetensors", SHAPES))
    key = next(iter(tensors))
    with pytest.raises(LoraFileError, match=r"^style \(in memory\): .*is a list"):
        Pair.open(tensors, {**tensors, key: [1.0]}, ScoreCache(tmp_path))  # type: ignore[dict-item]
    for odd, what in (
        ({3: torch.zeros(1)}, "3: is a key of type int"),
        ({key: torch.zeros(2, dtype=torch.complex128)}, "complex128"),
        ({key: torch.zeros(2, 2).to_sparse()}, "sparse"),
        ({key: torch.zeros(2, 2, device="meta")}, "the device meta"),
    ):
        with pytest.raises(LoraFileError, match=rf"^subject \(in memory\): .*{what}"):
            Pair.open({**tensors, **odd}, tensors, ScoreCache(tmp_path))  # type: ignore[dict-item]
    with pytest.raises(LoraFileError, match=r"^subject \(in memory\): zero modules"):
        Pair.open({"a.weight": torch.zeros(1)}, tensors, ScoreCache(tmp_path))
    tensors[key] = tensors[key] * torch.nan
    with pytest.raises(LoraValueError, match=rf"^subject \(in memory\): {key}"):
        Pair.open(tensors, tmp_path / "x.safetensors", ScoreCache(tmp_path)).plan(Settings())
