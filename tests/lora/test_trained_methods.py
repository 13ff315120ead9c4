"""Files as the trainers of published methods write them are ordinary LoRAs here (docs/policies.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import klora
from klora.cache import ScoreCache
from klora.errors import LoraFileError
from klora.lora.file import LoraFile
from tests.support.lora_files import write_lora

BLOCKS = ("up_blocks.0.attentions.0", "up_blocks.0.attentions.1")
NAMES = [
    f"{block}.transformer_blocks.0.{at}.{leaf}"
    for block in BLOCKS
    for at in ("attn1", "attn2")
    for leaf in ("to_q", "to_out.0")
]
OUT, IN, RANK, ALPHA = 16, 12, 3, 6.0
Factors = tuple[torch.Tensor, torch.Tensor]


def low_rank(down: str, up: str) -> Callable[[str, Factors], dict[str, torch.Tensor]]:
    """Writes a module's factors under two keys, in which {} is its path."""
    return lambda name, factors: {up.format(name): factors[0], down.format(name): factors[1]}


def kohya(name: str, factors: Factors) -> dict[str, torch.Tensor]:
    key = f"lora_unet_{name.replace('.', '_')}"
    made = low_rank(f"{key}.lora_down.weight", f"{key}.lora_up.weight")(name, factors)
    # The same ΔW by a scale of alpha / rank.
    return {**made, f"{key}.lora_up.weight": factors[0] * RANK / ALPHA, f"{key}.alpha": torch.tensor(ALPHA)}


def zip_lora(name: str, factors: Factors) -> dict[str, torch.Tensor]:
    return {f"unet.unet.{name}.lora.weight": factors[0] @ factors[1]}


def processor(name: str, factors: Factors) -> dict[str, torch.Tensor]:
    stem, leaf = name.split(".to_")
    key = f"unet.{stem}.processor.to_{leaf.removesuffix('.0')}_lora"
    return low_rank(f"{key}.down.weight", f"{key}.up.weight")(name, factors)


WRITERS = {
    "ZipLoRA: the merged difference": zip_lora,
    "B-LoRA: diffusers, twice the prefix": low_rank("unet.unet.{}.lora.down.weight", "unet.unet.{}.lora.up.weight"),
    "UnZipLoRA: diffusers": low_rank("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "joint training: DreamBooth of diffusers": low_rank("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    "joint training: DreamBooth of older diffusers": processor,
    "joint training: kohya": kohya,
    "CopRA, BeamLoRA: PEFT": low_rank("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "SMoRA: PEFT with the adapter's name": low_rank(
        "base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight"
    ),
}


def factors_of(seed: int) -> dict[str, Factors]:
    draw = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(OUT, RANK, generator=draw), torch.randn(RANK, IN, generator=draw)) for name in NAMES}


def write(path: Path, writer: Callable[[str, Factors], dict[str, torch.Tensor]], **more: torch.Tensor) -> Path:
    tensors = {key: tensor for name, factors in factors_of(1).items() for key, tensor in writer(name, factors).items()}
    save_file({key: tensor.contiguous() for key, tensor in {**tensors, **more}.items()}, path)
    return path


@pytest.mark.parametrize("method", WRITERS)
def test_the_file_of_a_trained_method_is_an_ordinary_lora(tmp_path: Path, method: str) -> None:
    path = write(tmp_path / "trained.safetensors", WRITERS[method])
    file = LoraFile.open(path)
    assert file.unmatched == []
    assert sorted(file.modules) == sorted(NAMES)
    for name, (up, down) in factors_of(1).items():
        assert torch.allclose(file.modules[name].matrix(), up @ down, atol=1e-5)
    other = write_lora(tmp_path / "other.safetensors", dict.fromkeys(NAMES, (OUT, IN)), rank=2, seed=2)
    for pair in ((path, other), (other, path)):
        plan = klora.plan(*pair, cache=ScoreCache(tmp_path / "cache"))
        assert len(plan.contested) == len(NAMES)


def test_a_lora_of_one_block_as_b_lora_trains_it_is_the_only_one_there(tmp_path: Path) -> None:
    writer = WRITERS["B-LoRA: diffusers, twice the prefix"]
    path = write(tmp_path / "content.safetensors", lambda name, f: writer(name, f) if BLOCKS[0] in name else {})
    other = write_lora(tmp_path / "other.safetensors", dict.fromkeys(NAMES, (OUT, IN)), rank=2, seed=2)
    plan = klora.plan(path, other, policy="b-lora", cache=ScoreCache(tmp_path / "cache"))
    assert {name: plan.selection(name)[0] for name in NAMES} == {
        name: "c" if BLOCKS[0] in name else "s" for name in NAMES
    }


def test_what_is_beside_a_lora_is_listed_and_does_nothing(tmp_path: Path) -> None:
    # The column masks of UnZipLoRA, the router of SMoRA, the gates of MoLE: no part of ΔW.
    more = {
        f"unet.{NAMES[0]}.lora.merge_content": torch.ones(1, IN),
        "base_model.model.router.weight": torch.ones(2, 2),
    }
    file = LoraFile.open(write(tmp_path / "trained.safetensors", WRITERS["UnZipLoRA: diffusers"], **more))
    assert sorted(file.unmatched) == sorted(more)
    assert len(file.modules) == len(NAMES)


def test_gates_alone_are_no_lora(tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    save_file({f"{name}.gate.weight": torch.ones(2, IN) for name in NAMES}, path)
    with pytest.raises(LoraFileError):
        LoraFile.open(path)
