"""What docs/python.md says of a pipeline's model: gradients pass through a fusion, and its weights may be cast."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import klora
from klora.lora.file import LoraFile
from klora.lora.names import kind_of
from tests.support.lora_files import write_lora
from tests.support.models import module_shapes
from tests.support.pipelines import CONTEXT, TOKENS, run, sd_pipeline

BOTH = {"policy": "direct"}
FP8 = torch.float8_e4m3fn


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return sd_pipeline(tmp_path / "tokenizer", levels=2)


@pytest.fixture
def files(pipe: Any, tmp_path: Path) -> tuple[Path, Path]:
    shapes = {name: shape for name, shape in module_shapes(pipe.unet).items() if kind_of(name) == "attention"}
    first, second = (write_lora(tmp_path / f"{i}.safetensors", shapes, rank=4, seed=i, strength=0.3) for i in (1, 2))
    return first, second


def gradient(unet: Any, timestep: Tensor) -> Tensor:
    """Of the output, towards the latents that the model is shown."""
    noise = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 16, 16, generator=noise).requires_grad_()
    prompt = torch.randn(1, TOKENS, CONTEXT, generator=noise)
    unet(latents, timestep, prompt).sample.square().sum().backward()
    assert latents.grad is not None
    return latents.grad


def near(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("engine", ["bypass", "held"])
def test_gradients_are_those_of_merged_weights(
    pipe: Any, files: tuple[Path, Path], engine: str, checkpointing: bool
) -> None:
    merged = copy.deepcopy(pipe.unet)
    for file in files:
        for name, delta in LoraFile.open(file).modules.items():
            merged.get_submodule(name).weight.data += delta.matrix()
    pipe.scheduler.set_timesteps(3)
    first = pipe.scheduler.timesteps[0]
    plain, expected = gradient(pipe.unet, first), gradient(merged, first)
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.unet.train()
    with klora.fuse(pipe, *files, **BOTH, engine=engine):
        found = gradient(pipe.unet, first)
    assert near(found, expected)
    assert not near(found, plain)
    assert near(gradient(pipe.unet, first), plain)


def test_gradients_pass_after_a_picture_in_the_block(pipe: Any, files: tuple[Path, Path]) -> None:
    with klora.fuse(pipe, *files, **BOTH):
        pipe.scheduler.set_timesteps(3)
        expected = gradient(pipe.unet, pipe.scheduler.timesteps[0])
    with klora.fuse(pipe, *files, **BOTH):
        with torch.inference_mode():
            run(pipe, num_inference_steps=3)
        pipe.scheduler.set_timesteps(3)
        assert near(gradient(pipe.unet, pipe.scheduler.timesteps[0]), expected)


@pytest.mark.parametrize("engine", ["auto", "held"])
def test_weights_that_are_cast_layer_by_layer_act_as_what_they_are_cast_to(
    pipe: Any, files: tuple[Path, Path], engine: str
) -> None:
    if not hasattr(pipe.unet, "enable_layerwise_casting"):
        pytest.skip("this diffusers does not cast layer by layer")
    rounded = copy.deepcopy(pipe.unet)
    pipe.unet.enable_layerwise_casting(storage_dtype=FP8, compute_dtype=torch.float32)
    stored = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    assert any(value.dtype == FP8 for value in stored.values())
    rounded.load_state_dict({name: value.float() for name, value in stored.items()})
    with klora.fuse(pipe, *files, engine=engine):
        cast = run(pipe, num_inference_steps=2)
    after = pipe.unet.state_dict()
    assert all(torch.equal(after[name].float(), value.float()) for name, value in stored.items())
    pipe.unet = rounded
    plain = run(pipe, num_inference_steps=2)
    with klora.fuse(pipe, *files, engine="bypass"):
        assert near(cast, run(pipe, num_inference_steps=2))
    assert not near(cast, plain)
