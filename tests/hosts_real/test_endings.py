"""However a picture ends, the next one is as if K-LoRA had never run; the check after every test is in conftest.py."""

from __future__ import annotations

from typing import Any

import pytest

from tests.hosts_real.server import ApiError, Picture, Server

TAG = "<klora:subj:style>"


@pytest.mark.parametrize("tag", [TAG, "<klora:subj_te:style_te>"])
@pytest.mark.parametrize("kind", ["interrupt", "skip"])
def test_interrupted(server: Server, plain: Picture, kind: str, tag: str) -> None:
    whole = server.txt2img(tag)
    server.fault(kind)
    assert not server.txt2img(tag).same(whole)
    assert server.txt2img().same(plain)
    assert server.txt2img(tag).same(whole)


@pytest.mark.parametrize("kind", ["error", "oom"])
def test_an_exception_in_the_unet(server: Server, plain: Picture, untouched: dict[str, Any], kind: str) -> None:
    whole = server.txt2img(TAG)
    server.fault(kind)
    with pytest.raises(ApiError) as failed:
        server.txt2img(TAG)
    assert failed.value.status == 500
    assert server.hooks()["unet"] == untouched["unet"]["hooks"]
    assert server.txt2img().same(plain)
    assert server.txt2img(TAG).same(whole)


def test_an_exception_in_the_hires_pass(server: Server, plain: Picture, untouched: dict[str, Any]) -> None:
    server.fault("error", after=server.defaults["steps"] + 2)
    with pytest.raises(ApiError):
        server.hires(TAG)
    assert server.hooks()["unet"] == untouched["unet"]["hooks"]
    assert server.txt2img().same(plain)


def test_a_checkpoint_switch_and_back(server: Server, plain: Picture) -> None:
    if server.other_model is None:
        pytest.skip("needs a second SD 1 checkpoint")
    first = server.txt2img(TAG)
    server.options(sd_model_checkpoint=server.other_model.path.name)
    try:
        other = server.txt2img()
        assert not other.same(plain)
        assert not server.txt2img(TAG).same(other)
        assert server.txt2img().same(other)
    finally:
        server.options(sd_model_checkpoint=server.model.path.name)
    assert server.txt2img(TAG).same(first)


def test_another_architecture(server: Server) -> None:
    if server.sdxl_model is None:
        pytest.skip("needs an SDXL checkpoint")
    server.options(sd_model_checkpoint=server.sdxl_model.path.name)
    try:
        picture = server.txt2img("<klora:subj_te:style_te>")
        assert "K-LoRA" in picture.comments
        assert "K-LoRA error" in picture.infotext
        assert picture.same(server.txt2img())
    finally:
        server.options(sd_model_checkpoint=server.model.path.name)


def test_a_refiner_takes_over(server: Server, plain: Picture) -> None:
    if server.other_model is None:
        pytest.skip("needs a second SD 1 checkpoint")
    refined = {"refiner_checkpoint": server.other_model.path.name, "refiner_switch_at": 0.5}
    without = server.txt2img(**refined)
    assert not without.same(plain)
    whole = server.txt2img(TAG, **refined)
    assert "K-LoRA" not in whole.comments
    assert not whole.same(without)
    steps = server.defaults["steps"]
    taus = server.taus(lambda: server.txt2img(TAG, **refined))
    # Both models follow one schedule.
    assert taus == pytest.approx([i / steps for i in range(steps)])
    assert server.txt2img().same(plain)


def test_a_refiner_of_another_architecture_stops_the_fusion(server: Server, plain: Picture) -> None:
    if server.sdxl_model is None:
        pytest.skip("needs an SDXL checkpoint")
    refined = {"refiner_checkpoint": server.sdxl_model.path.name, "refiner_switch_at": 0.5}
    try:
        server.txt2img(**refined)
    except ApiError:
        pytest.skip("the host itself cannot refine SD 1 with SDXL")
    picture = server.txt2img(TAG, **refined)
    assert "K-LoRA" in picture.comments
    assert server.txt2img().same(plain)


def test_reload_ui(server: Server, plain: Picture) -> None:
    fused = server.txt2img(TAG)
    server.reload_ui()
    assert server.txt2img().same(plain)
    assert server.txt2img(TAG).same(fused)
    server.reload_ui()
    assert server.txt2img(TAG).same(fused)


def test_between_plain_loras_nothing_mixes(server: Server, plain: Picture) -> None:
    lora, fused = server.txt2img("<lora:subj_te:1>"), server.txt2img("<klora:subj_te:style_te>")
    assert server.txt2img("<lora:subj_te:1>").same(lora)
    assert server.txt2img("<klora:subj_te:style_te>").same(fused)
    assert server.txt2img().same(plain)
    assert server.txt2img("<klora:subj:style>").same(server.txt2img("<klora:subj:style>"))
