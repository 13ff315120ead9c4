"""One ComfyUI for all tests, and after every test a look whether anything was left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.hosts_real.checkpoints import ATTENTION, FEED_FORWARD, PROJECTIONS, RESNET, UNET, Checkpoint
from tests.hosts_real.comfyui.server import ComfyServer, find_comfyui
from tests.support.lora_files import write_lora


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running ComfyUI; the test is skipped where there is none."""
    found = find_comfyui(tmp_path_factory.mktemp("comfyui"))
    if isinstance(found, str):
        pytest.skip(found)
    try:
        found.start()
        write_loras(found)
        yield found
    finally:
        found.stop()


@pytest.fixture(autouse=True)
def nothing_left(comfyui: ComfyServer) -> Iterator[None]:
    """After every test: no hook on any model, and every weight as it was before."""
    before = comfyui.state()
    yield
    after = comfyui.state()
    assert {name: state for name, state in after.items() if name in before} == before
    assert not any(state["hooks"] or state["wrapped"] for state in after.values())


def write_loras(server: ComfyServer) -> None:
    """Write the files that the tests name, for each of the probe's models."""

    def write(name: str, shapes: dict[str, tuple[int, ...]], spelling: str = "kohya", **more: Any) -> None:
        path = server.loras / f"{name}.safetensors"
        write_lora(path, shapes, spelling, **{"rank": 4, "alpha": 4.0, "strength": 0.2, **more})

    for kind in ("sd1", "sdxl"):
        model = Checkpoint(Path(kind), {f"{UNET}{name}.weight": shape for name, shape in server.shapes(kind).items()})
        if kind == "sdxl":
            model.shapes["conditioner.embedders.1."] = ()
        attention = model.modules(*ATTENTION)
        everything = model.modules(*ATTENTION, *FEED_FORWARD, *PROJECTIONS, *RESNET)
        clip = {
            f"text_encoder.text_model.encoder.layers.{layer}.self_attn.{leaf}_proj": (768, 768)
            for layer in range(2)
            for leaf in "qkv"
        }
        for name, shapes, seed in (
            ("subject", attention, 1),
            ("style", attention, 2),
            ("all_subject", everything, 3),
            ("all_style", everything, 4),
            ("text_subject", {**attention, **clip}, 5),
            ("text_style", {**attention, **clip}, 6),
        ):
            write(f"{kind}_{name}", shapes, seed=seed)
        write(f"{kind}_style_peft", attention, "peft", seed=2)
        # ComfyUI divides magnitudes of outputs by the norms of the model's weights, and not of the changed ones.
        write(f"{kind}_dora", attention, family="dora-in", seed=1)
        # Random magnitudes would make so much of every layer that rounding alone tells two pictures apart.
        path = server.loras / f"{kind}_dora.safetensors"
        tensors = load_file(path)
        save_file({key: one * 0.2 if key.endswith("dora_scale") else one for key, one in tensors.items()}, str(path))
    for kind in ("flux", "qwen"):
        for name, seed in (("subject", 1), ("style", 2)):
            write_generic(server.loras / f"{kind}_{name}.safetensors", server.shapes(kind), seed)


def write_generic(path: Path, shapes: dict[str, tuple[int, ...]], seed: int, rank: int = 4) -> None:
    """A LoRA of all linear layers of a transformer's blocks by their own paths, as ai-toolkit writes it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        if "block" in name and len(shape) == 2:
            down = torch.randn(rank, shape[1], generator=generator) * shape[1] ** -0.5
            tensors[f"diffusion_model.{name}.lora_A.weight"] = down
            tensors[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(shape[0], rank, generator=generator) * 0.3
    save_file(tensors, str(path))
