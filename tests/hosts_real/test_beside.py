"""Extensions of others beside K-LoRA: LoRA Block Weight and ADetailer, where KLORA_BESIDE names their folders."""

from __future__ import annotations

from typing import Any

import pytest

from tests.hosts_real.server import Picture, Server

TAG = "<klora:subj:style>"
PAIR = {"subject": "subj", "style": "style"}
ONCE = "K-LoRA alone applies it"
DETAILS = {
    "ad_model": "stand-in.pt",
    "ad_inpaint_only_masked": False,
    # ADetailer-Neo would make 1024×1024 of the smallest detail.
    "ad_use_inpaint_width_height": True,
    "ad_inpaint_width": 64,
    "ad_inpaint_height": 64,
}
"""ADetailer with the probe's detector, which finds the middle of every picture."""


def needs(server: Server, name: str) -> None:
    """Skip the test where the host has no script of that name."""
    if not any(one["name"] == name for one in server.call("/sdapi/v1/script-info")):
        pytest.skip(f"KLORA_BESIDE names no {name}")


def test_block_weight_acts_on_a_lora_beside(server: Server) -> None:
    needs(server, "lora block weight")
    if server.kind == "neo":
        pytest.skip("LoRA Block Weight takes Neo for Automatic1111, and fails for want of its networks")
    for tag in ("", TAG):
        whole = server.txt2img(f"{tag}<lora:subj_te:1>")
        assert server.txt2img(f"{tag}<lora:subj_te:1:lbw=ALL>").distance(whole) <= 1
        assert server.txt2img(f"{tag}<lora:subj_te:1:lbw=INS>").distance(whole) > 1


@pytest.mark.parametrize("tags", [f"{TAG} <lora:subj:1:lbw=INS>", f"<lora:subj:1:lbw=INS> {TAG}"])
def test_a_file_of_the_pair_with_block_weights_is_applied_once(server: Server, tags: str) -> None:
    needs(server, "lora block weight")
    picture = server.txt2img(tags)
    assert picture.same(server.txt2img(TAG))
    assert ONCE in picture.comments


def detailed(server: Server, tags: str = "", klora: dict[str, Any] | None = None) -> Picture:
    """A picture whose middle ADetailer makes anew."""
    scripts: dict[str, Any] = {"ADetailer": {"args": [True, False, DETAILS]}}
    if klora is not None:
        scripts["K-LoRA"] = {"args": [klora]}
    server.call("/klora-probe/seed")
    return server.txt2img(tags, alwayson_scripts=scripts)


def test_the_fusion_acts_in_the_details_too(server: Server) -> None:
    needs(server, "adetailer")
    once, twice = (len(server.taus(lambda make=make: make(server, TAG))) for make in (Server.txt2img, detailed))
    assert twice > once
    picture = detailed(server, TAG)
    assert detailed(server, klora=PAIR).same(picture)
    # Of one file twice it is that file alone, in both passes.
    assert detailed(server, "<klora:subj:subj_peft>").distance(detailed(server, "<lora:subj:1>")) <= 1


def test_a_map_is_no_picture_to_adetailer(server: Server) -> None:
    pytest.importorskip("matplotlib")
    needs(server, "adetailer")
    made = detailed(server, klora={**PAIR, "show_map": True})
    assert made.only(0).same(detailed(server, TAG))
    assert len(made.all) == 2
