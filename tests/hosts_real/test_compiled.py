"""A model that the host compiles for its calls, as Neo does by its accordion."""

from __future__ import annotations

from typing import Any

import pytest

from tests.hosts_real.server import Picture, Server

TAG = "<klora:subj:style>"
QUICKEST = "guard_filter_fn"


@pytest.fixture
def compiling(server: Server) -> Any:
    """The accordion's name and what switches it off."""
    for one in server.call("/sdapi/v1/script-info"):
        choices = one["args"][0]["choices"] or [] if one["args"] else []
        if QUICKEST in choices:
            return one["name"], choices[1]
    pytest.skip("the host offers no torch.compile; Neo does where triton is installed")


def test_a_fusion_of_a_compiled_model_acts_or_says_why_not(server: Server, plain: Picture, compiling: Any) -> None:
    accordion, off = compiling

    def make(tags: str, preset: str) -> Picture:
        return server.txt2img(tags, alwayson_scripts={accordion: {"args": [preset]}})

    fused = server.txt2img(TAG)
    try:
        # Compiled without a fusion, so that torch knows of no hook.
        assert make("", QUICKEST).distance(plain) <= 1
        picture = make(TAG, QUICKEST)
        if "K-LoRA error" in picture.infotext:
            assert picture.distance(plain) <= 1
            assert "128 modules" in picture.comments
            assert "subject share" not in picture.infotext
        else:
            assert picture.distance(fused) <= 1
        assert make("", QUICKEST).distance(plain) <= 1
    finally:
        make("", off)
    assert server.txt2img(TAG).same(fused)
