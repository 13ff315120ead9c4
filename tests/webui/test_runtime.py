"""A fusion in a fake host of either family: what a tag does, and that nothing is left of it however a picture ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from klora.hosts.webui import schedule_of
from klora.webui.register import register
from tests.support.lora_files import write_lora
from tests.support.pairs import ATTENTION, FEED_FORWARD, TEXT, shapes
from tests.webui.fake_host import Checkpoint, FakeHost, Picture, Processing, installed

FORCED = "<klora:dog:ink:alpha=0:beta=0>"
TAG = "<klora:dog:ink>"


@pytest.fixture(params=["a1111", "forge"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeHost]:
    """A host with four LoRAs: dog and ink for attention, dog_te and ink_te for the text encoder too."""
    names = shapes([*ATTENTION, *FEED_FORWARD])
    write_lora(tmp_path / "dog.safetensors", names, rank=4, seed=1)
    write_lora(tmp_path / "ink.safetensors", names, rank=8, seed=2)
    write_lora(tmp_path / "ink_peft.safetensors", names, "peft", rank=8, seed=2)
    for name, seed in (("dog_te", 3), ("ink_te", 4)):
        path = write_lora(tmp_path / f"{name}.safetensors", {**names, TEXT: (32, 32)}, rank=4, seed=seed, alpha=2.0)
        tensors = {key.replace("lora_te1_", "lora_te_"): tensor for key, tensor in load_file(path).items()}
        save_file(tensors, path)
    with installed(request.param, tmp_path) as found:
        found.start(register)
        # Of what the page needs, a fake host has nothing.
        found.callbacks.swallowed.clear()
        yield found


@pytest.fixture
def plain(host: FakeHost) -> Picture:
    return host.txt2img("a dog")


@pytest.fixture(autouse=True)
def nothing_left(host: FakeHost, plain: Picture) -> Iterator[None]:
    """After every test: no hook; then the plain picture, and the model, as they were."""
    model, weights = host.sd_model, host.sd_model.weights()
    yield
    assert host.sd_model.hooks() == 0
    host.sd_model = model
    host.in_unet, host.before_evaluation = lambda number: None, lambda p, denoiser: None
    assert host.sd_model.hooks() == 0
    assert host.txt2img("a dog").same(plain)
    assert host.loaded == []
    assert all(torch.equal(weight, weights[name]) for name, weight in host.sd_model.weights().items())


def taus(host: FakeHost, monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[float]:
    """The τ of every evaluation that K-LoRA follows."""
    from klora.engine.session import Session

    found: list[float] = []
    original = Session.at_level

    def at_level(self: Session, level: float) -> None:
        original(self, level)
        assert self.tau is not None
        found.append(self.tau)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "at_level", at_level)
        run()
    return found


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
    assert seen == [len(ATTENTION) + len(FEED_FORWARD)] * 6


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
            if host.family == "forge":
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


def test_the_text_encoder_s_part(host: FakeHost) -> None:
    both = host.txt2img("a dog <klora:dog_te:ink_te:policy=direct>")
    assert both.close_to(host.txt2img("a dog <lora:dog_te:1><lora:ink_te:1>"))
    none = host.txt2img("a dog <klora:dog_te:ink_te:policy=direct:text_encoder=none>")
    assert none.close_to(host.txt2img("a dog <lora:dog_te:1:te=0:unet=1><lora:ink_te:1:te=0:unet=1>"))
    style = host.txt2img("a dog <klora:dog_te:ink_te:1:0.5:policy=direct:text_encoder=style>")
    assert style.close_to(host.txt2img("a dog <lora:dog_te:1:te=0:unet=1><lora:ink_te:0.5>"))


@pytest.mark.parametrize("firstpass", [False, True])
def test_the_text_encoder_s_part_acts_once_in_either_pass(host: FakeHost, firstpass: bool) -> None:
    # A host may encode the hires prompt inside the encoding of the first.
    host.opts.hires_fix_use_firstpass_conds = firstpass
    tag, loras = "<klora:dog_te:ink_te:policy=direct>", "<lora:dog_te:1><lora:ink_te:1>"
    fused = host.txt2img(f"a dog {tag}", hr_prompt=f"a dog, sharp {tag}")
    assert fused.close_to(host.txt2img(f"a dog {loras}", hr_prompt=f"a dog, sharp {loras}"))


def test_conditionings_are_cached_by_the_whole_tag(host: FakeHost, plain: Picture) -> None:
    tags = ("", ":0.5", ":1:0.5", ":text_encoder=none", ":text_encoder=subject")
    pictures = [host.txt2img(f"a dog <klora:dog_te:ink_te{rest}>") for rest in tags]
    assert not any(one.same(other) for i, one in enumerate(pictures) for other in pictures[:i])
    assert host.txt2img("a dog").same(plain)
    for rest, picture in zip(tags[::-1], pictures[::-1], strict=True):
        assert host.txt2img(f"a dog <klora:dog_te:ink_te{rest}>").same(picture)


@pytest.mark.parametrize("order", ["<lora:dog:1>{}", "{}<lora:dog:1>", "<lora:dog:0.5:te=0.5:unet=0.7>{}"])
def test_the_same_file_in_a_plain_tag_is_silenced(host: FakeHost, order: str) -> None:
    picture = host.txt2img("a dog " + order.format(FORCED))
    assert "dog is in a <lora:…> tag too" in picture.comments
    assert picture.close_to(host.txt2img(f"a dog {FORCED}"))


def test_other_plain_tags_stay(host: FakeHost) -> None:
    both = host.txt2img(f"a dog <lora:dog_te:0.5>{FORCED}")
    assert both.comments == ""
    assert both.close_to(host.txt2img("a dog <lora:dog_te:0.5><lora:dog:1>"))


@pytest.mark.parametrize(
    ("tag", "says"),
    [
        ("<klora:dog>", "<klora:dog>: it must name a subject and a style"),
        ("<klora:dog:nobody>", "there is no LoRA named 'nobody'"),
        ("<klora:dog:imk>", "did you mean ink?"),
        ("<klora:dog:ink:beta=-1>", "<klora:dog:ink:beta=-1>: beta"),
        ("<klora:dog:ink:1:2:3>", "one number too many"),
        ("<klora:dog:../dog>", "there is no LoRA named"),
        ("<klora:dog:broken>", "broken.safetensors"),
        ("<klora:dog:small>", "choose two LoRAs for the same model"),
        ("<klora:small:small>", "choose a LoRA made for this model"),
        ("<klora:dog:nan>", "nan.safetensors"),
    ],
)
def test_a_bad_tag_is_named_and_the_picture_is_made(
    host: FakeHost, plain: Picture, tmp_path: Path, tag: str, says: str
) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    write_lora(tmp_path / "small.safetensors", shapes(ATTENTION, 16), rank=2)
    bad = load_file(tmp_path / "ink.safetensors")
    bad[next(key for key in bad if key.endswith("up.weight"))][0, 0] = float("nan")
    save_file(bad, tmp_path / "nan.safetensors")
    picture = host.txt2img(f"a dog {tag}")
    assert picture.same(plain)
    assert says in picture.comments
    assert str(tmp_path) not in picture.comments
    assert picture.p.extra_generation_params["K-LoRA error"]
    assert not host.callbacks.swallowed


def test_of_two_tags_the_first_counts(host: FakeHost) -> None:
    picture = host.txt2img(f"a dog {FORCED}<klora:ink:dog>")
    assert "holds 2 <klora:…> tags; only the first" in picture.comments
    assert picture.same(host.txt2img(f"a dog {FORCED}"))


def test_keys_that_nobody_knows_are_told_of(host: FakeHost, tmp_path: Path) -> None:
    tensors = load_file(tmp_path / "ink.safetensors")
    tensors["something.else"] = torch.zeros(3)
    save_file(tensors, tmp_path / "more.safetensors")
    picture = host.txt2img("a dog <klora:dog:more>")
    assert "keys are unknown, such as something.else" in picture.comments


def test_a_file_that_changes_on_disk_is_read_again(host: FakeHost, tmp_path: Path) -> None:
    first = host.txt2img(f"a dog {TAG}")
    write_lora(tmp_path / "ink.safetensors", shapes([*ATTENTION, *FEED_FORWARD]), rank=2, seed=9)
    second = host.txt2img(f"a dog {TAG}")
    assert not second.same(first)
    assert second.comments == ""


def test_the_image_s_text_says_what_acted(host: FakeHost) -> None:
    params = host.txt2img(f"a dog {TAG}").p.extra_generation_params
    assert params["K-LoRA scale"] == "s"
    assert "K-LoRA subject share" in params
    assert "dog: " in params["Lora hashes"]
    assert "ink: " in params["Lora hashes"]
    assert "K-LoRA error" not in params


def test_an_unexpected_fault_of_ours_is_told_of(
    host: FakeHost, plain: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("klora.engine.session.Session.at_level", fail)
    picture = host.txt2img(f"a dog {TAG}")
    assert picture.same(plain)
    assert "an unexpected ZeroDivisionError: a fault" in picture.comments


def test_timesteps_that_a_host_tells_as_noise_levels() -> None:
    # Forge's DDIM samplers are made of timesteps, and its callback is given σ.
    products = torch.linspace(0.999, 0.005, 1000)
    timesteps = torch.tensor([1, 251, 501, 751])
    sampler = SimpleNamespace(get_timesteps=lambda p, steps: timesteps)
    p = SimpleNamespace(steps=4, is_hr_pass=False, init_images=None)
    model = SimpleNamespace(inner_model=SimpleNamespace(alphas_cumprod=products))
    denoiser = SimpleNamespace(p=p, sampler=sampler, inner_model=model)
    assert schedule_of(denoiser) == [1, 251, 501, 751]
    denoiser.classic_ddim_eps_estimation = True
    assert schedule_of(denoiser) == [float(((1 - products) / products)[t] ** 0.5) for t in timesteps]
