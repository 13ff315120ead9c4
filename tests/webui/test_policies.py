"""Other policies than K-LoRA's in a fake host: they act and leave nothing, and those that cannot run say why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from klora.fusion.policies import POLICIES
from tests.webui.fake_host import FakeHost, Picture
from tests.webui.fake_processing import Processing
from tests.webui.hosts import host, nothing_left, plain

__all__ = ["host", "nothing_left", "plain"]


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "b-lora"])
def test_every_policy_acts_and_can_be_repeated(host: FakeHost, plain: Picture, policy: str) -> None:
    fused = host.txt2img(f"a dog <klora:dog:ink:policy={policy}>")
    assert not fused.same(plain)
    assert host.txt2img(f"a dog <klora:dog:ink:policy={policy}>").same(fused)
    assert not host.callbacks.swallowed


def test_what_cannot_run_says_so_and_leaves_the_picture_plain(host: FakeHost, plain: Picture) -> None:
    made = host.txt2img("a dog <klora:dog:ink:policy=b-lora>")
    assert made.same(plain)
    assert "SDXL" in made.comments


def test_a_composite_averages_what_the_model_predicts_with_each_lora_alone(host: FakeHost) -> None:
    step = [host.txt2img(f"a dog {tag}", steps=1).pixels for tag in ("<lora:dog:1>", "<lora:ink:1>")]
    made = host.txt2img("a dog <klora:dog:ink:policy=composite>", steps=1)
    assert torch.allclose(made.pixels, (step[0] + step[1]) / 2, rtol=1e-4, atol=1e-4)
    made = host.txt2img("a dog <klora:dog:ink:policy=cm-lora>", steps=1)
    assert torch.allclose(made.pixels, 0.6 * step[0] + 0.4 * step[1], rtol=1e-4, atol=1e-4)


def test_a_prediction_is_kept_for_the_steps_it_may_be(host: FakeHost) -> None:
    calls = []
    host.in_unet = lambda number: calls.append(number)
    original = host.sd_model.diffusion.forward
    counted: list[int] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        counted.append(1)
        return original(*args, **kwargs)

    host.sd_model.diffusion.forward = forward  # type: ignore[method-assign]
    try:
        host.txt2img("a dog <klora:dog:ink:policy=cm-lora:period=6:refresh=3>")
    finally:
        del host.sd_model.diffusion.forward
    assert len(calls) == 6
    # The non-dominant forward at two of six steps.
    assert len(counted) == 8


def test_what_was_decided_while_sampling_is_in_the_plan(host: FakeHost) -> None:
    p = Processing(host, "a dog <klora:dog:ink:policy=dynamic>")
    host.process(p)
    (plan,) = p.klora_plans
    letters = {plan.selection(module.name) for module in plan.contested}
    assert set("".join(letters)) <= set("cs")


def test_references_without_a_model_are_named(host: FakeHost, plain: Picture) -> None:
    made = host.txt2img("a dog <klora:dog:ink:policy=dynamic:style_refs=/nowhere/a.png>")
    assert "style_refs" in made.comments
    assert made.same(plain)


@pytest.mark.parametrize(
    "setting",
    [
        "style_refs=/etc",
        "subject_refs=../outside.png",
        "style_refs=a.png;../../x",
        "clip_model=someone/else",
        "dino_model=/tmp",
    ],
)
def test_a_prompt_names_neither_paths_nor_models(host: FakeHost, plain: Picture, tmp_path: Path, setting: str) -> None:
    (tmp_path / "outside.png").touch()
    made = host.txt2img(f"a dog <klora:dog:ink:policy=dynamic:{setting}>")
    assert setting.partition("=")[0] in made.comments
    assert str(tmp_path) not in made.comments
    assert made.same(plain)
