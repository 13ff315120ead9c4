"""Other policies than K-LoRA's in a fake host: they act and leave nothing, and those that cannot run say why."""

from __future__ import annotations

from pathlib import Path

import pytest

from klora.fusion.policies import policies_on
from klora.fusion.policies.base import WEBUI
from tests.webui.fake_host import FakeHost, Picture
from tests.webui.fake_processing import Processing
from tests.webui.hosts import host, nothing_left, plain

__all__ = ["host", "nothing_left", "plain"]


@pytest.mark.parametrize("policy", [name for name in policies_on(WEBUI) if name != "b-lora"])
def test_every_policy_acts_and_can_be_repeated(host: FakeHost, plain: Picture, policy: str) -> None:
    fused = host.txt2img(f"a dog <klora:dog:ink:policy={policy}>")
    assert not fused.same(plain)
    assert host.txt2img(f"a dog <klora:dog:ink:policy={policy}>").same(fused)
    assert not host.callbacks.swallowed


@pytest.mark.parametrize("policy", ["composite", "cm-lora", "b-lora"])
def test_what_cannot_run_says_so_and_leaves_the_picture_plain(host: FakeHost, plain: Picture, policy: str) -> None:
    made = host.txt2img(f"a dog <klora:dog:ink:policy={policy}>")
    assert made.same(plain)
    assert ("SDXL" if policy == "b-lora" else "2 forwards") in made.comments


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
