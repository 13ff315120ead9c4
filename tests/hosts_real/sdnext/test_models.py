"""Models that SD.Next stores, moves, compiles or changes; and pictures that end early."""

from __future__ import annotations

import pytest

from tests.hosts_real.sdnext.server import SdnextServer
from tests.hosts_real.server import Picture

TAG = "<klora:sd_subject:sd_style>"
FORCED = "<klora:sd_subject:sd_style:alpha=0:beta=0>"
SUBJECT = "<lora:sd_subject:1>"


@pytest.mark.parametrize("kind", ["int8", "uint4", "float8_e4m3fn"])
def test_weights_stored_by_sdnq(sdnext: SdnextServer, plain: Picture, kind: str) -> None:
    sdnext.use("sd_other")
    try:
        body = {"weights_dtype": kind, "minimum_allowed_numel": 1, "add_skip_keys": False}
        assert sdnext.call("/klora-probe/quantise", body)["layers"] > 100
        before = sdnext.txt2img()
        names = "sd_other_subject:sd_other_style"
        forced = sdnext.txt2img(f"<klora:{names}:alpha=0:beta=0>")
        # The host stores the sum in the same few bits, or beside them; a bypass loses nothing.
        assert forced.distance(before) > 5
        assert sdnext.txt2img("<klora:sd_subject_dora:sd_style:alpha=0:beta=0>").distance(before) > 5
        assert sdnext.txt2img(f"<klora:{names}>").distance(forced) > 5
        assert sdnext.txt2img().same(before)
    finally:
        sdnext.use("sd")


@pytest.mark.parametrize("mode", ["balanced", "model", "none"])
def test_offloaded_models(sdnext: SdnextServer, plain: Picture, mode: str) -> None:
    whole = sdnext.txt2img(TAG)
    sdnext.options(diffusers_offload_mode=mode)
    try:
        sdnext.use("sd_other")
        sdnext.use("sd")
        assert sdnext.txt2img().distance(plain) <= 1
        assert sdnext.txt2img(TAG).distance(whole) <= 1
    finally:
        sdnext.options(diffusers_offload_mode="none")
        sdnext.use("sd_other")
        sdnext.use("sd")


def test_a_compiled_model_acts(sdnext: SdnextServer, plain: Picture) -> None:
    whole = sdnext.txt2img(TAG)
    sdnext.use("sd_other")
    sdnext.use("sd")
    sdnext.call("/klora-probe/compile_denoiser")
    sdnext.txt2img()
    assert sdnext.txt2img(TAG).distance(whole) <= 1
    sdnext.use("sd_other")


def test_a_checkpoint_switch_and_back(sdnext: SdnextServer, plain: Picture) -> None:
    whole = sdnext.txt2img(TAG)
    sdnext.use("sd_other")
    other = sdnext.txt2img(TAG)
    assert not other.same(whole)
    assert not other.same(sdnext.txt2img())
    sdnext.use("sdxl")
    picture = sdnext.txt2img(TAG)
    assert "K-LoRA error" in picture.infotext
    assert picture.same(sdnext.txt2img())
    sdnext.use("sd")
    assert sdnext.txt2img(TAG).same(whole)


@pytest.mark.parametrize("kind", ["interrupt", "error"])
@pytest.mark.parametrize("second", [False, True], ids=["first pass", "second pass"])
def test_a_picture_that_ends_early(sdnext: SdnextServer, plain: Picture, kind: str, second: bool) -> None:
    before = sdnext.state()
    make = sdnext.hires if second else sdnext.txt2img
    sdnext.fault(kind, after=8 if second else 3)
    make(TAG)
    assert sdnext.state() == before
