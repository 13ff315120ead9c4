"""Tags in a fake host of each family: the text encoder, plain tags beside ours, bad tags, the picture's text."""

from __future__ import annotations

import hashlib
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from klora.errors import MismatchError
from klora.hosts.webui.loaded_model import host_of
from klora.hosts.webui.schedule import schedule_of
from klora.lora.deltas import Delta
from tests.support.lora_files import write_lora
from tests.support.pairs import ATTENTION, FEED_FORWARD, shapes
from tests.webui.fake_host import ExtraNetworkLora, FakeHost, Picture
from tests.webui.fake_processing import ExtraNetworkParams, Processing
from tests.webui.hosts import FORCED, TAG, host, nothing_left, plain

__all__ = ["host", "nothing_left", "plain"]


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


def _rewrite_text_encoder(path: Path, factor: float) -> None:
    tensors = load_file(path)
    for key in tensors:
        if key.startswith("lora_te") and key.endswith("up.weight"):
            tensors[key] = factor * tensors[key]
    save_file(tensors, path)


@pytest.mark.parametrize("values", [{}, {"hr_prompt": "a dog, sharp <klora:dog:ink_te>"}], ids=["first pass", "hires"])
def test_a_conditioning_is_that_of_the_files_as_they_are(
    host: FakeHost, tmp_path: Path, values: dict[str, Any]
) -> None:
    def fresh() -> Picture:
        Processing.cached_c = Processing.cached_hr_c = None
        return host.txt2img("a dog <klora:dog:ink_te>", **values)

    path = tmp_path / "ink_te.safetensors"
    hidden = path.rename(tmp_path / "ink_te.hidden")
    without = fresh()
    hidden.rename(path)
    first = host.txt2img("a dog <klora:dog:ink_te>", **values)
    assert first.same(fresh())
    assert not first.same(without)
    _rewrite_text_encoder(path, 3.0)
    second = host.txt2img("a dog <klora:dog:ink_te>", **values)
    assert second.same(fresh())
    assert not second.same(first)
    path.unlink()
    assert host.txt2img("a dog <klora:dog:ink_te>", **values).same(without)


@pytest.mark.parametrize("order", ["<lora:dog:1>{}", "{}<lora:dog:1>", "<lora:dog:0.5:te=0.5:unet=0.7>{}"])
def test_the_same_file_in_a_plain_tag_is_gone_and_not_merged_at_strength_0(host: FakeHost, order: str) -> None:
    expected, merges = host.txt2img(f"a dog {FORCED}"), host.merges
    picture = host.txt2img("a dog " + order.format(FORCED))
    assert "dog is asked for by another tag or setting too" in picture.comments
    assert picture.same(expected)
    assert host.merges == merges


@pytest.mark.parametrize("hires", [{}, {"hr_prompt": f"a dog, sharp {FORCED}"}], ids=["one pass", "hires"])
def test_a_network_that_the_host_adds_by_itself_is_applied_once(host: FakeHost, hires: dict[str, Any]) -> None:
    expected = host.txt2img(f"a dog {FORCED}", **hires)
    host.opts.sd_lora = "dog"
    picture = host.txt2img(f"a dog {FORCED}", **hires)
    assert "dog is asked for by another tag or setting too" in picture.comments
    assert picture.close_to(expected)
    alone = host.txt2img("a dog")
    host.opts.sd_lora = "None"
    assert alone.close_to(host.txt2img("a dog <lora:dog:1>"))


def test_what_others_have_made_of_the_host_s_loras_is_taken_out_too(host: FakeHost) -> None:
    """As LoRA Block Weight does: it changes strengths and names after the host has loaded its LoRAs."""

    def weaken() -> None:
        for net in host.loaded:
            net.name += "_changed"
            net.unet_multiplier *= 0.5
        patches = getattr(getattr(host.sd_model, "forge_objects", SimpleNamespace()), "unet", None)
        if hasattr(patches, "lora_patches"):
            patches.lora_patches = {(key[0], "0.5", *key[2:]): value for key, value in patches.lora_patches.items()}

    expected = host.txt2img(f"a dog {FORCED}")
    host.after_activation = weaken
    picture = host.txt2img(f"a dog {FORCED}<lora:dog:1>")
    host.after_activation = lambda: None
    assert picture.close_to(expected)
    assert host.txt2img("a dog <lora:dog:1>").close_to(host.txt2img(f"a dog {FORCED}"))


class LoraControl(ExtraNetworkLora):
    """A handler of an extension, which remembers what a tag said first and then uses the host's code."""

    def __init__(self, host: FakeHost) -> None:
        super().__init__(host)
        self.first: dict[str, str] = {}

    def activate(self, p: Any, params_list: list[ExtraNetworkParams]) -> None:
        for params in params_list:
            name, *numbers = params.positional
            params.positional = [name, self.first.setdefault(name, (*numbers, "1")[0])]
        super().activate(p, params_list)


@pytest.mark.parametrize("order", ["<{kind}:dog:0.7>{tag}", "{tag}<{kind}:dog:0.7>"])
@pytest.mark.parametrize("kind", ["lora", "lyco", "loractl"])
def test_whatever_ends_in_the_host_s_lora_code_is_silenced_for_the_same_file(
    host: FakeHost, kind: str, order: str
) -> None:
    if kind == "loractl":
        host.registry["lora"] = host.aliases["loractl"] = LoraControl(host)
    other = f"<{kind}:dog_te:0.5>"
    picture = host.txt2img("a dog " + order.format(kind=kind, tag=FORCED) + other)
    assert "dog is asked for by another tag or setting too" in picture.comments
    assert picture.close_to(host.txt2img(f"a dog {FORCED}{other}"))
    assert not picture.close_to(host.txt2img(f"a dog {FORCED}"))
    again = host.txt2img("a dog <klora:nobody:ink>" + f"<{kind}:dog:0.7>{other}")
    assert again.close_to(host.txt2img(f"a dog <{kind}:dog:0.7>{other}"))


def test_the_hashes_are_those_of_the_files_as_they_are(host: FakeHost, tmp_path: Path) -> None:
    path = tmp_path / "ink.safetensors"
    for seed in (2, 9):
        write_lora(path, shapes([*ATTENTION, *FEED_FORWARD]), rank=8, seed=seed)
        content = path.read_bytes()
        digest = hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
        assert f"ink: {digest[:12]}" in host.txt2img(f"a dog {TAG}").p.extra_generation_params["Lora hashes"]
    save_file(load_file(path), path, {"sshs_model_hash": "0123456789abcdef"})
    assert "ink: 0123456789ab" in host.txt2img(f"a dog {TAG}").p.extra_generation_params["Lora hashes"]


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
        ("<klora:DOG:ink>", "did you mean dog?"),
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


def test_a_file_that_was_moved_to_another_folder_is_found(host: FakeHost, tmp_path: Path) -> None:
    first = host.txt2img(f"a dog {TAG}")
    (tmp_path / "styles").mkdir()
    (tmp_path / "ink.safetensors").rename(tmp_path / "styles" / "ink.safetensors")
    moved = host.txt2img(f"a dog {TAG}")
    assert moved.comments == ""
    assert moved.same(first)


def test_the_same_file_twice_is_told_of(host: FakeHost) -> None:
    picture = host.txt2img("a dog <klora:dog:dog>")
    assert "subject and style are the same file" in picture.comments
    assert picture.close_to(host.txt2img("a dog <lora:dog:1>"))


def test_keys_that_nobody_knows_are_told_of(host: FakeHost, tmp_path: Path) -> None:
    tensors = load_file(tmp_path / "ink.safetensors")
    tensors["something.else"] = torch.zeros(3)
    save_file(tensors, tmp_path / "more.safetensors")
    picture = host.txt2img("a dog <klora:dog:more>")
    assert "not understood and do nothing: 1, such as something.else" in picture.comments


def test_a_file_that_changes_on_disk_is_read_again(host: FakeHost, tmp_path: Path) -> None:
    first = host.txt2img(f"a dog {TAG}")
    write_lora(tmp_path / "ink.safetensors", shapes([*ATTENTION, *FEED_FORWARD]), rank=2, seed=9)
    second = host.txt2img(f"a dog {TAG}")
    assert not second.same(first)
    assert second.comments == ""


def test_the_progress_of_scoring_is_shown_where_files_are_new(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str | None] = []
    state = type("State", (), {"__setattr__": lambda self, name, value: seen.append(value)})()
    monkeypatch.setattr(importlib.import_module("modules.shared"), "state", state)
    with caplog.at_level("INFO", "klora"):
        host.txt2img(f"a dog {TAG}")
        count = 2 * (len(ATTENTION) + len(FEED_FORWARD))
        assert seen == [*(f"K-LoRA: scored {i} of {count} modules" for i in range(1, count + 1)), None]
        host.txt2img(f"a dog {TAG}")
    assert seen[count + 1 :] == [None]
    assert caplog.text.count("scoring dog and ink, which is needed once") == 1


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


@pytest.mark.parametrize("fault", [MismatchError, OSError])
def test_a_text_encoder_s_part_that_cannot_be_applied_stops_the_fusion_and_not_the_job(
    host: FakeHost, plain: Picture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
) -> None:
    def fail(delta: Delta) -> None:
        raise fault(f"{delta.file}: a fault") if fault is MismatchError else OSError(5, "a fault", delta.file)

    monkeypatch.setattr(f"{type(host_of(host.sd_model)).__module__}.host_tensors", fail)
    picture = host.txt2img("a dog <klora:dog:ink_te>")
    assert picture.same(plain)
    assert "a fault" in picture.comments
    assert str(tmp_path) not in picture.comments


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
