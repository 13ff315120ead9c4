"""The same on an SDXL checkpoint, with both its text encoders."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hosts_real.server import Server


@pytest.fixture
def sdxl(server: Server) -> Iterator[Server]:
    if server.sdxl_model is None:
        pytest.skip("needs an SDXL checkpoint")
    server.options(sd_model_checkpoint=server.sdxl_model.path.name)
    try:
        yield server
    finally:
        server.options(sd_model_checkpoint=server.model.path.name)


def test_sdxl(sdxl: Server) -> None:
    fused = sdxl.txt2img("<klora:xl_subj:xl_style>")
    assert fused.comments == ""
    subject = sdxl.txt2img("<lora:xl_subj:1>")
    assert fused.distance(subject) > 5
    forced = sdxl.txt2img("<klora:xl_subj:xl_style:alpha=0:beta=0:text_encoder=subject>")
    assert forced.distance(subject) <= 1
    both = sdxl.txt2img("<klora:xl_subj:xl_style:policy=direct>")
    assert both.distance(sdxl.txt2img("<lora:xl_subj:1><lora:xl_style:1>")) <= 1
    assert sdxl.txt2img("<klora:xl_subj:xl_style_peft>").distance(fused) <= 1
