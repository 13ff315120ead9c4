"""K-LoRA in SD.Next, which leads diffusers pipelines and calls nobody before an evaluation."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from klora.webui.api import known_users
from klora.webui.extra_network import STATE
from klora.webui.injection import PLANS, apply_request
from klora.webui.messages import hand_on_comments
from klora.webui.pipeline_fusion import WITHOUT_DETAILER, WITHOUT_REFINER
from klora.webui.register import register
from tests.support.lora_files import write_lora
from tests.webui.fake_sdnext import STEPS, FakeSdnext, Processing, StoppedError, installed

TAG = "<klora:dog:ink>"
SUBJECT, STYLE = "<klora:dog:ink:alpha=0:beta=0>", "<klora:dog:ink:alpha=0:beta=1e6>"
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
SHAPES = {
    f"{BLOCK}.{attention}.{leaf}": (8, width)
    for attention, width in (("attn1", 8), ("attn2", 32))
    for leaf in ("to_k", "to_v")
}
TEXT = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (32, 32)}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[FakeSdnext]:
    """A host with two pairs, dog and ink without a text encoder's part, dog_te and ink_te with one."""
    for seed, name in enumerate(("dog", "ink", "dog_te", "ink_te")):
        modules = {**SHAPES, **TEXT} if name.endswith("te") else SHAPES
        write_lora(tmp_path / f"{name}.safetensors", modules, rank=2, seed=seed, strength=2.0)
    with installed(tmp_path) as found:
        register()
        for callback in found.known["before_ui"][:1]:
            callback()
        yield found


@pytest.fixture(autouse=True)
def nothing_left(host: FakeSdnext) -> Iterator[None]:
    """After every test no hook is left, and the plain picture is as ever."""
    plain = host.process("a dog")
    hooks = host.hooks()
    yield
    assert host.hooks() == hooks
    assert torch.equal(host.process("a dog"), plain)
    assert host.swallowed == []


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def with_plain_lora(host: FakeSdnext, name: str, **values: Any) -> Tensor:
    """The picture with one LoRA in the weights themselves."""
    tensors = load_file(host.folder / f"{name}.safetensors")
    layers = {path: host.pipe.unet.get_submodule(path) for path in SHAPES}
    before = {path: layer.weight.data.clone() for path, layer in layers.items()}
    try:
        for path, layer in layers.items():
            key = f"lora_unet_{path.replace('.', '_')}"
            up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
            layer.weight.data += up @ down * (float(tensors.get(f"{key}.alpha", len(down))) / len(down))
        return host.process("a dog", **values)
    finally:
        for path, layer in layers.items():
            layer.weight.data.copy_(before[path])


def test_a_tag_acts_and_a_forced_winner_is_the_plain_lora(host: FakeSdnext) -> None:
    plain, fused = host.process("a dog"), host.process(f"a dog {TAG}")
    assert not close(fused, plain)
    assert close(host.process(f"a dog {SUBJECT}"), with_plain_lora(host, "dog"))
    assert close(host.process(f"a dog {STYLE}"), with_plain_lora(host, "ink"))


def test_the_pass_s_own_scheduler_tells_how_far_it_is(host: FakeSdnext) -> None:
    p = Processing(f"a dog {TAG}", enable_hr=True, hr_second_pass_steps=8)
    host.run(p)
    first, second = getattr(p, PLANS)
    # Each pass has a pipeline and a scheduler of its own.
    assert (first.steps, second.steps) == (STEPS, 8)


def test_a_pass_left_out_applies_the_pair_as_plain_loras(host: FakeSdnext) -> None:
    p = Processing("a dog <klora:dog:ink:passes=first>", enable_hr=True)
    host.run(p)
    assert [plan.settings.policy for plan in getattr(p, PLANS)] == ["k-lora", "direct"]


def test_a_pass_that_cannot_be_told_apart_is_said(host: FakeSdnext) -> None:
    p = Processing("a dog <klora:dog:ink:passes=hires>", enable_hr=True)
    with_method = Processing.init_hr
    del Processing.init_hr
    try:
        p.init_hr = None  # type: ignore[method-assign, assignment]
        del p.init_hr
        host.activate(_parsed(p))
    finally:
        Processing.init_hr = with_method  # type: ignore[method-assign]
    assert "second pass" in p.extra_generation_params["K-LoRA error"]


def _parsed(p: Processing) -> Processing:
    from tests.webui.fake_sdnext import _parse

    p.prompts, p.network_data = _parse(p.all_prompts)
    return p


def test_a_second_pass_s_own_prompt_may_hold_no_tag(host: FakeSdnext) -> None:
    p = Processing(f"a dog {TAG}", enable_hr=True, refiner_prompt="a cat")
    host.run(p)
    assert len(getattr(p, PLANS)) == 1


def test_the_accordion_reaches_a_second_pass_s_own_prompt(host: FakeSdnext) -> None:
    p = Processing("a dog", enable_hr=True, refiner_prompt="a cat")
    apply_request(p, [{"subject": "dog", "style": "ink"}])
    assert (p.all_prompts, p.refiner_prompt) == ([f"a dog {TAG}"], f"a cat {TAG}")
    host.has_refiner = True
    p = Processing("a dog", enable_hr=True, refiner_prompt="a cat")
    apply_request(p, [{"subject": "dog", "style": "ink"}])
    # A refiner reads that prompt as it is.
    assert p.refiner_prompt == "a cat"


def test_a_cell_of_a_grid_is_not_told_that_its_tag_was_typed(host: FakeSdnext) -> None:
    args = [{"subject": "dog", "style": "ink"}]
    p = Processing("a dog")
    apply_request(p, args)
    # The grid that is always on copies what the accordion has already written into.
    cell = copy.copy(p)
    cell.klora_overrides = {"balance": 1.0}  # type: ignore[attr-defined]
    apply_request(cell, args)
    processed = types.SimpleNamespace(comments="")
    hand_on_comments(cell, processed)
    assert (cell.all_prompts, processed.comments) == (["a dog <klora:dog:ink:balance=1>"], "")
    typed = Processing(f"a dog {TAG}")
    apply_request(typed, args)
    hand_on_comments(typed, processed)
    assert "the pair and settings beside it" in processed.comments


def test_img2img_starts_where_its_noise_is(host: FakeSdnext) -> None:
    image = host.process("a dog")
    source = {"init_images": image, "steps": 8}
    assert close(host.process(f"a dog {SUBJECT}", **source), with_plain_lora(host, "dog", **source))
    late = host.process("a dog <klora:dog:ink:policy=fixed>", **source)
    # The fixed rule gives the last two thirds of the schedule, where this picture lies, to the style.
    assert close(late, host.process(f"a dog {STYLE}", **source))


def test_conditionings_are_kept_by_the_files_that_act_in_them(host: FakeSdnext) -> None:
    with_text = "a dog <klora:dog_te:ink_te:alpha=0:beta=0>"
    first = host.process(with_text)
    assert close(host.process(with_text), first)
    write_lora(host.folder / "dog_te.safetensors", {**SHAPES, **TEXT}, rank=2, seed=9, strength=2.0)
    before = len(host.encoded)
    assert not close(host.process(with_text), first)
    assert len(host.encoded) == before + 1


def test_the_host_s_own_tag_of_the_same_file_is_silenced(host: FakeSdnext) -> None:
    for prompt in (f"a dog <lora:dog:1:in=1> <lora:other:1> {TAG}", f"a dog {TAG} <lora:dog:1> <lora:other:1>"):
        p = Processing(prompt)
        host.run(p)
        assert host.lora.loaded == ["other"]
        assert host.lora.told == {"include": [], "exclude": ["text_encoder"]}
        assert any("dog is asked for by another tag too" in text for text in p.comments)


def test_a_call_in_the_middle_of_sampling_changes_nothing(host: FakeSdnext) -> None:
    whole = host.process(f"a dog {TAG}")
    p = Processing(f"a dog {TAG}")
    host.at_step = lambda step: host.activate(p, step=step) if step else None
    assert torch.equal(host.run(p), whole)


def test_an_interrupted_picture_lets_go(host: FakeSdnext) -> None:
    def interrupt(step: int) -> None:
        if step == 1:
            raise StoppedError

    host.at_step = interrupt
    hooks = host.hooks()
    assert host.process(f"a dog {TAG}").numel() == 0
    assert host.hooks() == hooks
    host.at_step = lambda step: None


def test_a_schedule_that_is_not_known_stops_the_fusion_and_not_the_picture(host: FakeSdnext) -> None:
    p = Processing(f"a dog {TAG}")

    def lose(step: int) -> None:
        if step == 0:
            # As a scheduler does that is told other times than those it lists.
            host.sd_model.scheduler.timesteps = host.sd_model.scheduler.timesteps * 3.7

    host.at_step = lose
    assert host.run(p).numel()
    assert "cannot be told" in p.extra_generation_params["K-LoRA error"]
    host.at_step = lambda step: None


def test_a_bad_tag_is_named_and_the_picture_is_made_without(host: FakeSdnext) -> None:
    plain = host.process("a dog ")
    for tag, says in (("<klora:dog:nobody>", "nobody"), ("<klora:dog:ink:beta=-1>", "beta")):
        p = Processing(f"a dog {tag}")
        assert torch.equal(host.run(p), plain)
        assert says in p.extra_generation_params["K-LoRA error"]


def test_a_pipeline_that_k_lora_cannot_fuse_in_is_named(host: FakeSdnext) -> None:
    host.pipe.transformer_2 = torch.nn.Linear(2, 2)
    p = Processing(f"a dog {TAG}")
    host.sd_model = host.pipe
    host.activate(_parsed(p))
    del host.pipe.transformer_2
    assert "two transformers" in p.extra_generation_params["K-LoRA error"]


@pytest.mark.parametrize("part", ["", "mid_block"], ids=["whole", "a region"])
def test_a_compiled_model_is_fused_in(host: FakeSdnext, part: str) -> None:
    whole = host.process(f"a dog {TAG}")
    model = host.pipe.unet.get_submodule(part)
    model.compile(backend="eager")
    try:
        assert close(host.process(f"a dog {TAG}"), whole)
    finally:
        model._compiled_call_impl = None


def test_a_model_that_is_held_by_another_object_is_found(host: FakeSdnext) -> None:
    whole = host.process(f"a dog {TAG}")
    held = host._pipeline

    def holder(task: str) -> Any:
        pipe = held(task)
        return type("Holder", (), {"pipe": pipe, "__call__": lambda self, **options: pipe(**options)})()

    host._pipeline = holder  # type: ignore[method-assign]
    assert torch.equal(host.process(f"a dog {TAG}"), whole)
    host._pipeline = held  # type: ignore[method-assign]


def test_the_refiner_goes_on_without_and_it_is_said(host: FakeSdnext) -> None:
    host.has_refiner = True
    p = Processing(f"a dog {TAG}", enable_hr=True)
    host.run(p)
    assert any(WITHOUT_REFINER in text for text in p.comments)


def test_a_detailer_s_own_prompt_needs_a_tag_of_its_own(host: FakeSdnext) -> None:
    details = {"detailer_enabled": True, "detailer_prompt": "a nose\nan ear"}
    p = Processing("a dog", **details)
    apply_request(p, [{"subject": "dog", "style": "ink"}])
    assert p.detailer_prompt == f"a nose {TAG}\nan ear {TAG}"  # type: ignore[attr-defined]
    for prompt, said in (("a nose", True), (f"a nose {TAG}", False), ("[prompt], sharp", False), ("", False)):
        p = Processing(f"a dog {TAG}", detailer_enabled=True, detailer_prompt=prompt)
        host.run(p)
        assert any(WITHOUT_DETAILER in text for text in p.comments) == said


def test_a_detail_is_fused_and_leaves_the_picture_its_text(host: FakeSdnext) -> None:
    p = Processing(f"a dog {TAG}")
    host.run(p)
    told, plans = dict(p.extra_generation_params), getattr(p, PLANS)
    detail = copy.copy(p)
    detail.recursion = True  # type: ignore[attr-defined]
    fused = host.run(detail)
    assert close(fused, host.process(f"a dog {TAG}"))
    assert (p.extra_generation_params, getattr(p, PLANS)) == (told, plans)


def test_what_is_said_is_shown_under_the_picture(host: FakeSdnext) -> None:
    p = Processing("a dog <klora:dog:nobody>")
    host.run(p)
    processed = types.SimpleNamespace(comments="the host's own")
    hand_on_comments(p, processed)
    first, said = processed.comments.splitlines()
    assert first == "the host's own"
    assert said.startswith("K-LoRA: not applied: there is no LoRA named 'nobody'")
    hand_on_comments(p, processed)
    assert len(processed.comments.splitlines()) == 2


def test_nothing_is_kept_on_a_picture_that_asks_for_nothing(host: FakeSdnext) -> None:
    p = Processing("a dog")
    host.run(p)
    assert not hasattr(p, STATE)
    assert p.extra_generation_params == {}


def test_the_routes_ask_for_what_the_host_s_own_ask_for(tmp_path: Path) -> None:
    file = tmp_path / "users"
    file.write_text("eve:one\nadam : two\n")
    options = types.SimpleNamespace(api_auth=None, auth='"ada:pass","bob:word"', auth_file=str(file))
    assert known_users(options) == {"ada": "pass", "bob": "word", "eve": "one", "adam": "two"}
    assert known_users(types.SimpleNamespace(api_auth="ada:pass")) == {"ada": "pass"}
