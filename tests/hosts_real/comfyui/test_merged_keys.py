"""What `klora merge` writes is loaded whole by ComfyUI's own LoRA code, as the sum of what that makes of the inputs.

ComfyUI's maps of keys say which names a file may have: each of them is the spelling of two inputs.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from klora import cli
from tests.hosts_real.comfyui.server import ComfyServer, find_comfyui

PROGRAM = Path(__file__).with_name("key_map.py")
ROOTS = {
    "sd1": ("lora_unet_", "lycoris_", "diffusion_model."),
    "sdxl": ("lora_unet_", "lycoris_", "diffusion_model."),
    "flux": ("transformer.", "lycoris_", "lora_transformer_", "diffusion_model.", "lora_unet_"),
    "chroma": ("transformer.", "diffusion_model.", "lora_unet_"),
    "sd3": ("transformer.", "base_model.model.", "lora_transformer_", "lycoris_", "diffusion_model.", "lora_unet_"),
    "aura_flow": ("transformer.", "diffusion_model.", "lora_unet_"),
    "pixart_sigma": ("transformer.", "base_model.model.", "diffusion_model.", "lora_unet_"),
    "lumina2": ("diffusion_model.", "lora_unet_"),
    "wan": ("diffusion_model.", "lora_unet_"),
    "qwen_image": ("transformer.", "lycoris_", "diffusion_model.", "lora_unet_"),
}


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> ComfyServer:
    found = find_comfyui(tmp_path_factory.mktemp("comfyui"))
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(autouse=True)
def nothing_left() -> None:
    """Here no server runs in which something might be left."""


def run(comfyui: ComfyServer, *words: str) -> str:
    command = [str(comfyui.python), str(PROGRAM), str(comfyui.root), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1] if done.stdout else ""


def keys(comfyui: ComfyServer, model: str) -> dict[str, Any]:
    """The host's keys, each with the name, shape and rows of the weight that it means."""
    path = comfyui.data / f"{model}.json"
    run(comfyui, "keys", model, str(path))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write(path: Path, known: dict[str, Any], root: str, rank: int, seed: int) -> None:
    """A LoRA of all weights that have a key with that root, under the first of each one's."""
    generator = torch.Generator().manual_seed(seed)
    down, up = ("lora_down", "lora_up") if root.endswith("_") else ("lora_A", "lora_B")
    seen, tensors = set(), {}
    for key, (name, (out, *rest), rows) in known.items():
        # A part of a weight that has a key as a whole, and the one weight of FLUX that K-LoRA leaves out.
        left = key.endswith("linear1_qkv") or re.search(r"final_layer[._]adaLN_modulation", key)
        if not key.startswith(root) or left or (name, str(rows)) in seen:
            continue
        seen.add((name, str(rows)))
        out = rows[2] if rows else out
        tensors[f"{key}.{down}.weight"] = 0.1 * torch.randn(rank, *rest, generator=generator)
        ones = (1 for _ in rest[1:])
        tensors[f"{key}.{up}.weight"] = 0.1 * torch.randn(out, rank, *ones, generator=generator)
    assert len(tensors) > 20
    save_file(tensors, path)


@pytest.mark.parametrize("model", ROOTS)
def test_a_merged_file_is_loaded_whole(comfyui: ComfyServer, tmp_path: Path, model: str) -> None:
    known = keys(comfyui, model)
    cases = {
        root: [tmp_path / f"{root}{name}.safetensors" for name in ("dog", "ink", "merged")] for root in ROOTS[model]
    }
    for root, (dog, ink, merged) in cases.items():
        write(dog, known, root, rank=2, seed=1)
        write(ink, known, root, rank=4, seed=2)
        words = ("--policy", "direct", "--style-strength", "0.5", "-o", str(merged))
        assert cli.main(["merge", str(dog), str(ink), *words]) == 0
    out = tmp_path / "changes"
    out.mkdir()
    said = run(comfyui, "load", model, str(out), *(str(path) for paths in cases.values() for path in paths))
    assert json.loads(said) == []
    for root, paths in cases.items():
        subject, style, both = (load_file(out / path.name) for path in paths)
        assert both.keys() == subject.keys() == style.keys(), root
        for name, change in both.items():
            wanted = subject[name] + 0.5 * style[name]
            assert wanted.any()
            assert (change - wanted).abs().max() < 2e-3 * wanted.abs().max(), (root, name)
