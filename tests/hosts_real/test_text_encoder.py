"""The text encoders' part goes through the host's own LoRA code, and the cache of conditionings stays right."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.hosts_real.server import Picture, Server

BOTH = "<klora:subj_te:style_te:policy=direct>"


def test_both_parts_together_are_two_plain_loras(server: Server) -> None:
    plain = server.txt2img("<lora:subj_te:1><lora:style_te:1>")
    assert server.txt2img(BOTH).distance(plain) <= 1
    weaker = server.txt2img("<lora:subj_te:0.5><lora:style_te:0.8>")
    assert server.txt2img("<klora:subj_te:style_te:0.5:0.8:policy=direct>").distance(weaker) <= 1


def test_none_leaves_the_text_encoder_alone(server: Server) -> None:
    # The host's own way to say so: strength of the text encoder 0, of the UNet 1.
    unet_only = server.txt2img("<lora:subj_te:0:1><lora:style_te:0:1>")
    none = server.txt2img("<klora:subj_te:style_te:policy=direct:text_encoder=none>")
    assert none.distance(unet_only) <= 1
    assert none.distance(server.txt2img(BOTH)) > 5


@pytest.mark.parametrize("role", ["subject", "style"])
def test_one_side_s_text_encoder(server: Server, role: str) -> None:
    sides = ("1:1", "0:1") if role == "subject" else ("0:1", "1:1")
    plain = server.txt2img(f"<lora:subj_te:{sides[0]}><lora:style_te:{sides[1]}>")
    assert server.txt2img(f"<klora:subj_te:style_te:policy=direct:text_encoder={role}>").distance(plain) <= 1


def test_the_cache_of_conditionings_is_right(server: Server, plain: Picture) -> None:
    tags = (
        "<klora:subj_te:style_te>",
        "<klora:subj_te:style_te:0.5>",
        "<klora:subj_te:style_te:1:0.5>",
        "<klora:subj_te:style_te:text_encoder=none>",
        "<klora:subj_te:style_te:text_encoder=style>",
    )
    pictures = [server.txt2img(tag) for tag in tags]
    for i, picture in enumerate(pictures):
        assert not any(picture.same(other) for other in pictures[:i]), tags[i]
    assert server.txt2img().same(plain)
    for tag, picture in reversed(list(zip(tags, pictures, strict=True))):
        assert server.txt2img(tag).same(picture), tag


def test_a_conditioning_is_that_of_the_files_as_they_are(server: Server, plain: Picture) -> None:
    folder = server.data / "models" / "Lora"
    live, tag = folder / "live.safetensors", "<klora:live:style_te>"
    pictures = {}
    assert server.txt2img(tag).same(plain)
    for name in ("subj_te", "style_te", "subj"):
        shutil.copy(folder / f"{name}.safetensors", live)
        pictures[name] = server.txt2img(tag)
    live.unlink()
    assert server.txt2img(tag).same(plain)
    # Not before, for in between no other prompt may have been encoded.
    for name, picture in pictures.items():
        named = server.txt2img(f"<klora:{name}:style_te>")
        assert picture.same(named), name
        assert _hash_of("live", picture) == _hash_of(name, named)


def _hash_of(name: str, picture: Picture) -> str:
    found = re.search(rf"{name}: ([0-9a-f]{{12}})", picture.infotext)
    assert found is not None
    return found[1]


def test_hires_conditionings(server: Server) -> None:
    plain = server.hires("<lora:subj_te:1><lora:style_te:1>")
    assert server.hires(BOTH).distance(plain) <= 1


def test_the_unet_is_not_merged(server: Server) -> None:
    before = server.state()["unet"]["hash"]
    server.txt2img("<klora:subj_te:style_te>")
    assert server.state()["unet"]["hash"] == before
    assert server.state()["loaded"] == []


def test_functional_loras(server: Server) -> None:
    if server.kind != "a1111":
        pytest.skip("a setting of A1111")
    merged = server.txt2img("<klora:subj_te:style_te>")
    server.options(lora_functional=True)
    try:
        assert server.txt2img("<klora:subj_te:style_te>").distance(merged) <= 1
        forced = server.txt2img("<klora:subj_te:style_te:alpha=0:beta=0:text_encoder=subject>")
        assert forced.distance(server.txt2img("<lora:subj_te:1>")) <= 1
    finally:
        server.options(lora_functional=False)
