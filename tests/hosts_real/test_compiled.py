"""A model that the host compiles for its calls, as Neo does by its accordion."""

from __future__ import annotations

import pytest

from tests.hosts_real.cases import QUICKEST, compiling
from tests.hosts_real.server import Picture, Server

TAG = "<klora:subj:style>"


@pytest.fixture
def accordion(server: Server) -> tuple[str, str]:
    found = compiling(server)
    if found is None:
        pytest.skip("the host does not compile for each call; Neo does where triton is installed")
    return found


def test_a_fusion_acts_in_a_model_that_is_compiled_for_each_call(
    server: Server, plain: Picture, accordion: tuple[str, str]
) -> None:
    name, off = accordion

    def make(tags: str, preset: str) -> Picture:
        return server.txt2img(tags, alwayson_scripts={name: {"args": [preset]}})

    fused = server.txt2img(TAG)
    try:
        # Compiled without a fusion, so that torch knows of no hook.
        assert make("", QUICKEST).distance(plain) <= 1
        picture = make(TAG, QUICKEST)
        assert "runs uncompiled as long as it is fused" in picture.comments
        assert picture.same(fused)
        assert make("", QUICKEST).distance(plain) <= 1
    finally:
        make("", off)
    assert server.txt2img(TAG).same(fused)
