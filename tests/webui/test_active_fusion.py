"""A fusion in a fake host of each family: what it does in each pass, and that nothing is left however it ends."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch

from klora.webui.attached_sessions import RUNS_AS_WRITTEN
from klora.webui.register import register
from tests.support.pairs import ATTENTION, FEED_FORWARD
from tests.webui.fake_host import FakeHost, Picture
from tests.webui.fake_model import Checkpoint
from tests.webui.fake_processing import Processing
from tests.webui.hosts import FORCED, TAG, host, nothing_left, plain, taus

__all__ = ["host", "nothing_left", "plain"]


def test_a_forced_winner_is_the_plain_lora(host: FakeHost, plain: Picture) -> None:
    forced = host.txt2img(f"a dog {FORCED}")
    assert forced.comments == ""
    assert forced.close_to(host.txt2img("a dog <lora:dog:1>"))
    style = host.txt2img("a dog <klora:dog:ink:1:0.7:beta=1e9>")
    assert style.close_to(host.txt2img("a dog <lora:ink:0.7>"))
    fused = host.txt2img(f"a dog {TAG}")
    assert not any(fused.close_to(other) for other in (plain, forced, style))
    assert host.txt2img("a dog <klora:dog:ink_peft>").close_to(fused)


def test_without_a_tag_no_hook_is_ever_registered(host: FakeHost, plain: Picture) -> None:
    host.in_unet = lambda number: pytest.fail("a hook") if host.sd_model.hooks() else None
    p = Processing(host, "a dog")
    attributes = set(vars(p))
    assert host.process(p).same(plain)
    assert {name for name in set(vars(p)) - attributes if "klora" in name} == set()
    assert p.extra_generation_params == {}
    assert not host.callbacks.swallowed


def test_while_sampling_there_are_hooks(host: FakeHost) -> None:
    seen = []
    host.in_unet = lambda number: seen.append(host.sd_model.hooks())
    host.txt2img(f"a dog {TAG}")
    modules = len(ATTENTION) + len(FEED_FORWARD)
    # One more looks in the first call whether the host has compiled the model.
    assert seen == [modules + 1] + [modules] * 5


def test_nothing_is_left_on_the_processing_object(host: FakeHost) -> None:
    p = Processing(host, f"a dog {TAG}")
    host.process(p)
    assert not {"sample", "setup_conds", "calculate_hr_conds"} & set(vars(p))


@pytest.mark.parametrize(
    "error", [RuntimeError("a fault"), torch.cuda.OutOfMemoryError("out of memory"), KeyboardInterrupt()], ids=repr
)
def test_an_exception_in_the_unet(host: FakeHost, plain: Picture, error: BaseException) -> None:
    def fail(number: int) -> None:
        if number == 3:
            assert host.sd_model.hooks()
            raise error

    whole = host.txt2img(f"a dog {TAG}")
    host.in_unet = fail
    p = Processing(host, f"a dog {TAG}")
    with pytest.raises(type(error)):
        host.process(p)
    assert host.sd_model.hooks() == 0
    assert "sample" not in vars(p)
    host.in_unet = lambda number: None
    assert host.txt2img("a dog").same(plain)
    assert host.txt2img(f"a dog {TAG}").same(whole)


def test_an_interrupt(host: FakeHost, plain: Picture) -> None:
    def interrupt(number: int) -> None:
        host.interrupted = number >= 3

    whole = host.txt2img(f"a dog {TAG}")
    host.in_unet = interrupt
    assert not host.txt2img(f"a dog {TAG}").same(whole)
    assert host.sd_model.hooks() == 0


def test_a_model_that_the_host_compiles_for_each_call(host: FakeHost, plain: Picture) -> None:
    fused, written = host.txt2img(f"a dog {TAG}"), host.sd_model.diffusion
    # What is compiled without a fusion knows of no hook, and asks for none.
    compiled = torch.compile(written, backend="eager")

    def show(model: Any) -> None:
        host.sd_model.diffusion = model
        of = host.sd_model if host.family == "a1111" else host.sd_model.forge_objects.unet
        of.model.diffusion_model = model

    # As Neo's accordion does: before a call nothing tells.
    host.before_evaluation = lambda p, denoiser: show(written)
    host.in_unet = lambda number: show(compiled)
    try:
        assert host.txt2img("a dog").close_to(plain)
        show(written)
        picture = host.txt2img(f"a dog {TAG}")
    finally:
        show(written)
    assert picture.comments == f"K-LoRA: {RUNS_AS_WRITTEN}"
    assert picture.close_to(fused)
    assert host.sd_model.hooks() == 0


@pytest.mark.parametrize("then", ["the next picture", "Reload UI"])
def test_an_ending_that_nobody_knows(host: FakeHost, plain: Picture, then: str) -> None:
    # As of a host that does not sample by p.sample.
    def fail(number: int) -> None:
        raise RuntimeError("a fault")

    host.in_unet = fail
    p = Processing(host, f"a dog {TAG}")
    sample = p.sample
    p.parse()
    host.activate(p, p.extra_network_data)
    p.setup_conds()
    with pytest.raises(RuntimeError):
        sample()
    assert host.sd_model.hooks()
    host.in_unet = lambda number: None
    if then == "Reload UI":
        host.reload_ui(register)
        assert host.sd_model.hooks() == 0
    assert host.txt2img("a dog").same(plain)


def test_a_model_switch_between_pictures(host: FakeHost, plain: Picture) -> None:
    first, whole = host.sd_model, host.txt2img(f"a dog {TAG}")
    host.sd_model = Checkpoint(host.family, "other", 2)
    other = host.txt2img("a dog")
    assert not host.txt2img(f"a dog {TAG}").same(other)
    assert host.txt2img("a dog").same(other)
    host.sd_model = first
    assert host.txt2img(f"a dog {TAG}").same(whole)


def _refine(host: FakeHost, other: Checkpoint) -> None:
    """Swap the model before the fourth evaluation, as the hosts do."""

    def swap(p: Processing, denoiser: Any) -> None:
        if denoiser.step == 3:
            host.sd_model = other
            if host.family != "a1111":
                host.activate(p, p.extra_network_data)
                p.setup_conds()
            else:
                host.activate(Processing(host, ""), {})

    host.before_evaluation = swap


def test_a_refiner_goes_on_where_the_model_was(host: FakeHost, plain: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = host.sd_model, Checkpoint(host.family, "refiner", 2)
    _refine(host, other)
    without = host.txt2img("a dog")
    host.sd_model = first
    pictures = []
    found = taus(host, monkeypatch, lambda: pictures.append(host.txt2img(f"a dog {TAG}")))
    assert found == pytest.approx([i / 6 for i in range(6)])
    assert not pictures[0].same(without)
    assert pictures[0].comments == ""
    assert first.hooks() == other.hooks() == 0


def test_a_refiner_of_another_architecture_stops_the_fusion(host: FakeHost) -> None:
    first, other = host.sd_model, Checkpoint(host.family, "refiner", 2, "SDXL", ["conv_in", "conv_out"])
    _refine(host, other)
    picture = host.txt2img(f"a dog {TAG}")
    assert "K-LoRA: " in picture.comments
    assert "refiner" in picture.comments
    assert picture.p.extra_generation_params["K-LoRA error"]
    assert first.hooks() == other.hooks() == 0


def test_reload_ui(host: FakeHost, plain: Picture) -> None:
    fused = host.txt2img(f"a dog {TAG}")
    for _ in range(2):
        host.reload_ui(register)
        assert host.txt2img("a dog").same(plain)
        assert host.txt2img(f"a dog {TAG}").same(fused)
    assert len(host.callbacks.known["cfg_denoiser"]) == 1
    host.callbacks.call("script_unloaded")
    assert "klora" not in host.registry


def test_activating_twice_is_activating_once(host: FakeHost) -> None:
    fused = host.txt2img(f"a dog {TAG}")
    p = Processing(host, f"a dog {TAG}")
    activate = host.activate

    def twice(p: Any, data: Any) -> None:
        activate(p, data)
        activate(p, data)

    host.activate = twice  # type: ignore[method-assign]
    assert host.process(p).same(fused)
    assert not vars(p).keys() & {"sample", "setup_conds"}


def test_every_batch_begins_anew(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = []
    found = taus(host, monkeypatch, lambda: pictures.append(host.txt2img(f"a dog {TAG}", n_iter=2)))
    assert found == pytest.approx([i / 6 for i in range(6)] * 2)
    first, second = pictures[0].pixels
    assert torch.equal(first, second)


def test_heun_evaluates_twice_at_a_noise(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    found = taus(host, monkeypatch, lambda: host.txt2img(f"a dog {TAG}", order=2))
    assert found == pytest.approx([0, *(i / 6 for i in range(1, 6) for _ in range(2))])


def test_img2img_begins_where_its_noise_is(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"init_images": torch.zeros(1, 32), "steps": 20, "denoising_strength": 0.4}
    found = taus(host, monkeypatch, lambda: host.txt2img(f"a dog {TAG}", **source))
    assert found == pytest.approx([i / 20 for i in range(11, 20)])
    found = taus(host, monkeypatch, lambda: host.txt2img("a dog <klora:dog:ink:progress=relative>", **source))
    assert found == pytest.approx([i / 9 for i in range(9)])


@pytest.mark.parametrize(
    ("tag", "hr_tag", "plain_tag", "plain_hr_tag"),
    [
        (FORCED, FORCED, "<lora:dog:1>", "<lora:dog:1>"),
        (FORCED, "<klora:dog:ink:beta=1e9>", "<lora:dog:1>", "<lora:ink:1>"),
        (FORCED, "", "<lora:dog:1>", ""),
        ("", FORCED, "", "<lora:dog:1>"),
        ("<klora:dog:nobody>", FORCED, "", "<lora:dog:1>"),
        ("<klora:dog:ink:passes=first:alpha=0:beta=0>",) * 2 + ("<lora:dog:1>", "<lora:dog:1><lora:ink:1>"),
        ("<klora:dog:ink:passes=hires:alpha=0:beta=0>",) * 2 + ("<lora:dog:1><lora:ink:1>", "<lora:dog:1>"),
    ],
)
def test_hires_prompts_have_tags_of_their_own(
    host: FakeHost, tag: str, hr_tag: str, plain_tag: str, plain_hr_tag: str
) -> None:
    fused = host.txt2img(f"a dog {tag}", hr_prompt=f"a dog, sharp {hr_tag}")
    assert host.sd_model.hooks() == 0
    assert fused.close_to(host.txt2img(f"a dog {plain_tag}", hr_prompt=f"a dog, sharp {plain_hr_tag}"))


def test_an_exception_in_the_hires_pass(host: FakeHost, plain: Picture) -> None:
    def fail(number: int) -> None:
        if number == 8:
            raise RuntimeError("a fault")

    for tag in ("", TAG):
        host.in_unet = fail
        with pytest.raises(RuntimeError):
            host.txt2img(f"a dog {tag}", hr_prompt=f"a dog {TAG}")
        assert host.sd_model.hooks() == 0


def test_an_inner_job_needs_the_tag_alone(host: FakeHost) -> None:
    # As ADetailer does it: after the picture, an img2img of its own with the picture's prompt.
    outer = host.txt2img(f"a dog {TAG}")
    inner = host.txt2img(f"a dog's face {FORCED}", init_images=outer.pixels)
    assert inner.close_to(host.txt2img("a dog's face <lora:dog:1>", init_images=outer.pixels))


def test_a_job_inside_a_job(host: FakeHost) -> None:
    whole = host.txt2img(f"a dog {TAG}")
    inner = []

    def nest(p: Processing, denoiser: Any) -> None:
        if denoiser.step == 3 and not inner:
            inner.append(None)
            inner[0] = host.txt2img(f"a cat {FORCED}")  # type: ignore[call-overload]

    host.before_evaluation = nest
    assert host.txt2img(f"a dog {TAG}").close_to(whole)
    assert inner[0] is not None


@pytest.mark.parametrize("steps", [6, 1])
def test_a_model_that_runs_other_modules_than_were_fused_is_told_and_the_text_claims_nothing(
    host: FakeHost, plain: Picture, steps: int
) -> None:
    model = host.sd_model.diffusion
    layers = model.layers
    # As where a compiled model goes on without looking at what has come to its modules since.
    model.layers = {name: copy.deepcopy(layer) for name, layer in layers.items()}
    try:
        picture = host.txt2img(f"a dog {TAG}", steps=steps)
    finally:
        model.layers = layers
    assert (
        f"stopped: none of the {len(layers)} modules of the LoRAs was called in the first evaluation"
        in picture.comments
    )
    assert {key for key in picture.p.extra_generation_params if key.startswith("K-LoRA")} == {"K-LoRA error"}


def test_modules_that_are_not_called_are_named_under_the_picture(host: FakeHost) -> None:
    model = host.sd_model.diffusion
    layers, left_out = model.layers, ATTENTION[0]
    model.layers = {name: layer for name, layer in layers.items() if name != left_out}
    try:
        picture = host.txt2img(f"a dog {TAG}")
    finally:
        model.layers = layers
    assert f"1 of the LoRAs' {len(layers)} modules, such as {left_out}, were not called" in picture.comments
    assert "K-LoRA error" not in picture.p.extra_generation_params


def test_the_second_pass_is_on_its_own_schedule(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of int(3 / 0.6) = 5 steps the last three are made, in a sampler of its own.
    run = partial(host.txt2img, f"a dog {TAG}", hr_prompt="", hr_second_pass_steps=3)
    assert taus(host, monkeypatch, run)[6:] == pytest.approx([0.4, 0.6, 0.8])
