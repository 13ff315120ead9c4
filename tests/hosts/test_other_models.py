"""Fusing on other models than SD and FLUX: names, progress and pictures of real diffusers classes, small and random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import klora
from klora.lora.file import LoraFile
from tests.support.other_pipelines import OTHERS, make, make_latents

SUBJECT_ONLY = {"scale": "s", "alpha": 0, "beta": 0}
STYLE_ONLY = {"scale": "s", "alpha": 0, "beta": 1e9}
RANK = 4
# A file's own key prefix and the endings of its tensors, as trainers write them.
SPELLINGS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "flat": (lambda name: f"lora_unet_{name.replace('.', '_')}", "lora_down", "lora_up"),
    "transformer": (lambda name: f"transformer.{name}", "lora_A", "lora_B"),
    "generic": (lambda name: f"diffusion_model.{name}", "lora_A", "lora_B"),
    "wrapper": (lambda name: f"base_model.model.{name}", "lora_A", "lora_B"),
    "lycoris": (lambda name: f"lycoris_{name.replace('.', '_')}", "lora_down", "lora_up"),
}


@pytest.fixture(params=list(OTHERS))
def made(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    return make(request.param)


def linears(pipe: Any) -> dict[str, nn.Linear]:
    return {name: module for name, module in pipe.transformer.named_modules() if isinstance(module, nn.Linear)}


def write_every_linear(path: Path, pipe: Any, spelling: str, seed: int) -> Path:
    """A LoRA on every linear layer, the same for one seed in every spelling."""
    prefix, down, up = SPELLINGS[spelling]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in linears(pipe).items():
        tensors[f"{prefix(name)}.{down}.weight"] = torch.randn(RANK, layer.in_features, generator=generator)
        tensors[f"{prefix(name)}.{up}.weight"] = 0.02 * torch.randn(layer.out_features, RANK, generator=generator)
    save_file(tensors, path)
    return path


def pair_of(pipe: Any, folder: Path, spellings: tuple[str, str] = ("flat", "transformer")) -> tuple[Path, Path]:
    subject = write_every_linear(folder / f"dog-{spellings[0]}.safetensors", pipe, spellings[0], seed=1)
    return subject, write_every_linear(folder / f"ink-{spellings[1]}.safetensors", pipe, spellings[1], seed=2)


def merged_by_hand(pipe: Any, options: dict[str, Any], path: Path, spelling: str) -> torch.Tensor:
    """The picture with W + up·down in the place of every W."""
    prefix, down, up = SPELLINGS[spelling]
    tensors, before = load_file(path), weights(pipe)
    with torch.no_grad():
        for name, layer in linears(pipe).items():
            layer.weight += tensors[f"{prefix(name)}.{up}.weight"] @ tensors[f"{prefix(name)}.{down}.weight"]
    picture = make_latents(pipe, options)
    pipe.transformer.load_state_dict(before)
    return picture


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pipe.transformer.state_dict().items()}


def hooks(pipe: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.transformer.modules())


def assert_close(one: torch.Tensor, two: torch.Tensor) -> None:
    assert (one - two).abs().max() <= 1e-4 * two.abs().max()


def assert_differs(one: torch.Tensor, two: torch.Tensor) -> None:
    assert (one - two).abs().max() > 1e-3 * two.abs().max()


def test_a_forced_side_gives_the_picture_of_that_lora_merged_by_hand(made: Any, tmp_path: Path) -> None:
    pipe, options = made
    files = pair_of(pipe, tmp_path)
    plain = make_latents(pipe, options)
    for settings, path, spelling in zip((SUBJECT_ONLY, STYLE_ONLY), files, ("flat", "transformer"), strict=True):
        with klora.fuse(pipe, *files, **settings) as session:
            fused = make_latents(pipe, options)
        assert session.missing == ()
        assert {module.name for module in session.plan.contested} == linears(pipe).keys()
        assert_close(fused, merged_by_hand(pipe, options, path, spelling))
        assert_differs(fused, plain)


def test_the_place_in_sampling_is_that_of_the_scheduler_and_nothing_is_left(made: Any, tmp_path: Path) -> None:
    pipe, options = made
    files = pair_of(pipe, tmp_path)
    plain, before, seen = make_latents(pipe, options), weights(pipe), []
    with klora.fuse(pipe, *files) as session:
        handle = pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(session.tau))
        first = make_latents(pipe, options, num_inference_steps=5)
        handle.remove()
        again = make_latents(pipe, options, num_inference_steps=5)
    assert list(dict.fromkeys(seen)) == pytest.approx([i / 5 for i in range(5)])
    assert sorted(seen) == seen
    assert torch.equal(first, again)
    assert hooks(pipe) == 0
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())
    assert torch.equal(make_latents(pipe, options), plain)


def test_every_spelling_of_the_names_gives_the_same_picture(made: Any, tmp_path: Path) -> None:
    pipe, options = made
    pictures, shares = [], []
    for spellings in (("flat", "transformer"), ("transformer", "generic"), ("wrapper", "lycoris")):
        with klora.fuse(pipe, *pair_of(pipe, tmp_path, spellings)) as session:
            pictures.append(make_latents(pipe, options))
            shares.append(session.plan.share)
    assert all(torch.equal(picture, pictures[0]) for picture in pictures)
    assert len(set(shares)) == 1
    assert 0 < shares[0] < 1


def test_a_file_of_another_model_is_not_taken_for_flux(made: Any, tmp_path: Path) -> None:
    pipe, _ = made
    for spelling in SPELLINGS:
        file = LoraFile.open(write_every_linear(tmp_path / f"{spelling}.safetensors", pipe, spelling, seed=1))
        assert file.architecture is None
        assert file.unmatched == []
        assert len(file.modules) == len(linears(pipe))
