"""A merged file is loaded by diffusers' own loader of each model, and gives the weights of the fusion."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import klora
from klora import cli
from tests.support.other_pipelines import OTHERS, make
from tests.support.pipelines import flux_pipeline

WAN = {"attn1": "self_attn", "attn2": "cross_attn", ".to_q": ".q", ".to_k": ".k", ".to_v": ".v", ".to_out.0": ".o"}
WAN |= {"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
# How others than diffusers name a module of the transformer: what they put before it, and what they call its parts.
SPELLINGS: dict[str, tuple[str, dict[str, str]]] = {
    "diffusers": ("transformer.", {}),
    "bare": ("diffusion_model.", {}),
    "wan": ("diffusion_model.", WAN),
    "wan-kohya": ("lora_unet_", WAN),
    "kohya": ("lora_unet_", {}),
}
# SD and SDXL have tests of their own, as have pictures of FLUX.
CASES = [(model, "diffusers") for model in ("flux", *OTHERS)]
CASES += [("wan", "wan"), ("wan", "wan-kohya"), ("z_image", "bare"), ("z_image", "kohya")]
CASES += [("qwen_image", "bare"), ("qwen_image", "kohya")]


def trained(pipe: Any) -> dict[str, nn.Linear]:
    """Attention, and Wan's feed-forward, without which diffusers does not load kohya's spelling of it."""
    return {
        name: module
        for name, module in pipe.transformer.named_modules()
        if isinstance(module, nn.Linear) and any(part in name for part in ("attn", "attention.", "ffn."))
    }


def matrices(pipe: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """What each of these modules does, as a matrix, with all that is hooked to it or wrapped around it."""
    found = {}
    with torch.no_grad():
        for name in names:
            module = pipe.transformer.get_submodule(name)
            eye = torch.eye(module.in_features)
            found[name] = (module(eye) - module(torch.zeros_like(eye))).t()
    return found


def write(path: Path, pipe: Any, spelling: str, rank: int, seed: int) -> Path:
    """A LoRA of these modules in a spelling."""
    root, parts = SPELLINGS[spelling]
    down, up = ("lora_down", "lora_up") if root.endswith("_") else ("lora_A", "lora_B")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in trained(pipe).items():
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs)
        prefix = root + (name.replace(".", "_") if root.endswith("_") else name)
        tensors[f"{prefix}.{down}.weight"] = 0.1 * torch.randn(rank, module.in_features, generator=generator)
        tensors[f"{prefix}.{up}.weight"] = 0.1 * torch.randn(module.out_features, rank, generator=generator)
    save_file(tensors, path)
    return path


def load(pipe: Any, path: Path) -> None:
    """Load a file as diffusers does; as PEFT does for PixArt, for which diffusers has no loader."""
    if hasattr(type(pipe), "load_lora_weights"):
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        pipe.transformer.fuse_lora()
        return
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(path).items()}
    modules = sorted({key.partition(".lora_")[0] for key in tensors})
    rank = next(len(tensor) for key, tensor in tensors.items() if ".lora_A." in key)
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=modules), pipe.transformer)
    assert not peft.set_peft_model_state_dict(pipe.transformer, tensors).unexpected_keys


@pytest.mark.parametrize(("model", "spelling"), CASES)
def test_its_weights_are_those_of_the_fusion(tmp_path: Path, model: str, spelling: str) -> None:
    pipe = flux_pipeline(tmp_path / "tokenizer") if model == "flux" else make(model)[0]
    subject = write(tmp_path / "dog.safetensors", pipe, spelling, rank=2, seed=1)
    style = write(tmp_path / "ink.safetensors", pipe, spelling, rank=4, seed=2)
    plain = matrices(pipe, trained(pipe))
    with klora.fuse(pipe, subject, style, policy="direct", style_strength=0.5) as session:
        session.start_pass([1.0, 0.5, 0.0])
        session.at_level(1.0)
        fused = matrices(pipe, plain)
    target = tmp_path / "merged.safetensors"
    words = ("--policy", "direct", "--style-strength", "0.5", "-o", str(target))
    assert cli.main(["merge", str(subject), str(style), *words]) == 0
    load(pipe, target)
    loaded = matrices(pipe, plain)
    for name, weight in plain.items():
        change = fused[name] - weight
        assert change.abs().max() > 0.01
        assert (loaded[name] - fused[name]).abs().max() < 2e-3 * change.abs().max(), name
