"""What sets the members of the Forge family apart: where their LoRA code lies, what it takes and what it gives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from klora.webui.register import register
from tests.support.lora_files import write_lora
from tests.support.pairs import ATTENTION, FEED_FORWARD, TEXT, shapes
from tests.webui.fake_host import FakeHost, installed
from tests.webui.fake_model import TEXT_LAYER


@pytest.fixture
def classic(tmp_path: Path) -> Iterator[FakeHost]:
    """Forge Classic, whose code gives what it has not used, as Forge's, and takes no names, as reForge's."""
    for name, seed in (("dog", 1), ("ink", 2)):
        layers = {**shapes([*ATTENTION, *FEED_FORWARD]), TEXT: (32, 32)}
        path = write_lora(tmp_path / f"{name}.safetensors", layers, rank=4, seed=seed)
        save_file({key.replace("lora_te1_", "lora_te_"): value for key, value in load_file(path).items()}, path)
    with installed("classic", tmp_path) as host:
        host.start(register)
        yield host


def test_the_text_encoder_s_part_in_forge_classic(classic: FakeHost) -> None:
    plain = classic.txt2img("a dog")
    both = classic.txt2img("a dog <klora:dog:ink:policy=direct>")
    assert both.close_to(classic.txt2img("a dog <lora:dog:1><lora:ink:1>"))
    assert classic.txt2img("a dog").same(plain)


def test_a_dora_that_the_host_leaves_out_is_named(classic: FakeHost, tmp_path: Path) -> None:
    tensors = load_file(tmp_path / "ink.safetensors")
    for key in [key for key in tensors if key.startswith("lora_te_") and key.endswith("lora_down.weight")]:
        tensors[key.replace("lora_down.weight", "dora_scale")] = torch.ones(32, 1)
    save_file(tensors, tmp_path / "ink.safetensors")
    picture = classic.txt2img("a dog <klora:dog:ink>")
    assert "ink.safetensors: this WebUI applies no DoRA to a text encoder" in picture.comments
    assert picture.same(classic.txt2img("a dog"))
    assert "no DoRA" not in classic.txt2img("a dog <klora:dog:ink:text_encoder=none>").comments


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_t5_is_found_under_the_number_that_the_host_gives_it(
    classic: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path = "encoder_block_0_layer_0_SelfAttention_q"
    names = {f"lora_te{number}_{path}": "t5xxl.weight"}
    monkeypatch.setattr(sys.modules["ldm_patched.modules.lora"], "model_lora_keys_clip", lambda model, keys: names)
    tensors = load_file(tmp_path / "dog.safetensors")
    tensors = {key.replace(f"lora_te_{TEXT_LAYER}", f"lora_te3_{path}"): value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "dog.safetensors")
    with_t5 = classic.txt2img("a dog <klora:dog:ink:text_encoder=subject>")
    assert not with_t5.same(classic.txt2img("a dog <klora:dog:ink:text_encoder=none>"))
