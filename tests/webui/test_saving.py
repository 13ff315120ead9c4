"""A fusion that is the same at every step becomes a LoRA that the host lists."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from klora.errors import KloraError
from klora.webui.args import read_values
from klora.webui.saving import save
from tests.webui.fake_host import FakeHost
from tests.webui.hosts import host, nothing_left, plain

__all__ = ["host", "nothing_left", "plain"]

DIRECT = {"subject": "dog", "style": "ink", "policy": "direct"}


@pytest.fixture
def folder(host: FakeHost, tmp_path: Path) -> Path:
    importlib.import_module("modules.shared").cmd_opts.lora_dir = str(tmp_path)
    return tmp_path


def test_a_saved_fusion_is_listed_and_gives_the_same_picture(host: FakeHost, folder: Path) -> None:
    assert "both is among the LoRAs now" in save(read_values(DIRECT), " both.safetensors ")
    saved, fused = host.txt2img("a dog <lora:both:1>"), host.txt2img("a dog <klora:dog:ink:policy=direct>")
    assert float((saved.pixels - fused.pixels).detach().abs().max()) < 0.01
    assert not list(folder.glob(".klora-*"))


def test_nothing_is_written_over(folder: Path, host: FakeHost) -> None:
    before = (folder / "dog.safetensors").read_bytes()
    with pytest.raises(KloraError, match="there already"):
        save(read_values(DIRECT), "dog")
    assert (folder / "dog.safetensors").read_bytes() == before


@pytest.mark.parametrize("beside", ["lora_unet_conv_norm_out.w_norm", "lora_te_text_model_final_layer_norm.b_norm"])
def test_a_fusion_of_files_that_change_norms_is_not_saved_in_part(folder: Path, host: FakeHost, beside: str) -> None:
    path = host.folder / "dog.safetensors"
    save_file(load_file(path) | {beside: torch.ones(32)}, path)
    with pytest.raises(KloraError, match="which a merged LoRA would lose") as error:
        save(read_values(DIRECT), "both")
    assert beside in str(error.value)
    assert not (folder / "both.safetensors").exists()


@pytest.mark.parametrize("name", ["", "  ", "../out", "a/b", "a\\b", ".hidden", "a:b", "a\nb", "x" * 200, "名" * 90])
def test_a_name_that_is_no_file_s_is_refused(folder: Path, host: FakeHost, name: str) -> None:
    known = set(folder.iterdir())
    with pytest.raises(KloraError):
        save(read_values(DIRECT), name)
    assert set(folder.iterdir()) == known


def test_a_lora_is_not_called_what_the_menus_call_none(folder: Path, host: FakeHost) -> None:
    with pytest.raises(KloraError, match="stands for no LoRA"):
        save(read_values(DIRECT), "None.safetensors")
    assert not (folder / "None.safetensors").exists()


def test_a_policy_that_depends_on_the_step_says_so(folder: Path, host: FakeHost) -> None:
    with pytest.raises(KloraError, match="depends on the step"):
        save(read_values({**DIRECT, "policy": "k-lora"}), "both")
