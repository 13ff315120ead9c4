"""A stand-in for ComfyUI with two LoRAs and a small model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.comfyui import fake_comfyui
from tests.comfyui.fake_comfyui import BaseModel, Patcher, Server
from tests.support.lora_files import write_lora

ATTENTION = {
    f"{block}.transformer_blocks.0.{attention}.{leaf}": (
        16,
        768 if attention == "attn2" and leaf in "to_k to_v" else 16,
    )
    for block in fake_comfyui.DIFFUSERS.values()
    for attention in ("attn1", "attn2")
    for leaf in ("to_q", "to_k", "to_v", "to_out.0")
}
TEXT = {f"text_encoder.text_model.encoder.layers.0.self_attn.{leaf}_proj": (8, 8) for leaf in "qkv"}


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    """ComfyUI's folder of LoRAs."""
    folder = tmp_path / "loras"
    folder.mkdir()
    write_lora(folder / "subject.safetensors", ATTENTION, seed=1, alpha=4.0, strength=0.3)
    write_lora(folder / "style.safetensors", ATTENTION, seed=2, alpha=2.0, strength=0.5)
    write_lora(folder / "text.safetensors", {**ATTENTION, **TEXT}, seed=3, alpha=4.0, strength=0.3)
    return folder


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch, loras: Path) -> Server:
    """ComfyUI's modules, and its server."""
    return fake_comfyui.install(monkeypatch, loras)


@pytest.fixture
def model() -> Patcher:
    """What a loader gives."""
    torch.manual_seed(0)
    return Patcher(BaseModel().requires_grad_(False))
