"""A pair is held against the chosen checkpoint before any picture, by what the headers of files say."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from klora.hosts.webui.checkpoints import architecture_of
from klora.webui.fitting import misfit
from tests.webui.fake_host import FakeHost
from tests.webui.hosts import host, nothing_left, plain

__all__ = ["host", "nothing_left", "plain"]

UNET = "model.diffusion_model."
ATTENTION = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
SHAPES = ("5", "{}", "[]", "[[]]", '"x"')
BROKEN = ["[" * 100_000, "{}", '{"a": 1}', *(f'{{"{ATTENTION}": {{"shape": {shape}}}}}' for shape in SHAPES)]
CHECKPOINTS = {
    "one": ({ATTENTION: (4, 768)}, "SD1"),
    "two": ({ATTENTION: (4, 1024)}, "SD2"),
    "xl": ({f"{UNET}label_emb.0.0.weight": (4, 4)}, "SDXL"),
    "flux": ({"double_blocks.0.img_attn.qkv.weight": (12, 4)}, "FLUX"),
    "other": ({"blocks.0.weight": (4, 4)}, None),
}


@pytest.fixture
def listed(host: FakeHost, tmp_path: Path) -> FakeHost:
    """Checkpoints beside the LoRAs, and one that is no safetensors file."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name, (shapes, _) in CHECKPOINTS.items():
        save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, folder / f"{name}.safetensors")
    (folder / "old.ckpt").write_bytes(b"PK\3\4 something else")
    files = {path.stem: types.SimpleNamespace(filename=str(path)) for path in folder.iterdir()}
    models = sys.modules["modules.sd_models"]
    models.get_closet_checkpoint_match = files.get  # type: ignore[attr-defined]
    return host


def test_a_checkpoint_s_header_tells_what_it_is(listed: FakeHost) -> None:
    for name, (_, architecture) in CHECKPOINTS.items():
        assert architecture_of(name) == architecture
    assert architecture_of("old") is None
    assert architecture_of("not listed") is None


@pytest.mark.parametrize("header", BROKEN, ids=range(len(BROKEN)))
def test_a_checkpoint_with_a_broken_header_tells_nothing(listed: FakeHost, tmp_path: Path, header: str) -> None:
    path = tmp_path / "checkpoints" / "old.ckpt"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    assert misfit("dog", "ink", "old") == ""


def test_a_pair_for_another_model_than_the_chosen_one_is_told_of_in_words(listed: FakeHost) -> None:
    assert misfit("dog", "ink", "flux").startswith("this pair is for SD 1, the checkpoint is FLUX")
    for checkpoint in ("one", "other", "old", ""):
        assert misfit("dog", "ink", checkpoint) == ""
    assert misfit("None", "ink", "flux") == misfit("dog", "", "flux") == ""
    assert "there is no LoRA named 'nobody'" in misfit("dog", "nobody", "one")
