"""Sides of several LoRAs, and when and where they act, against the host's own LoRAs."""

from __future__ import annotations

import pytest

from klora.webui.args import text_of
from klora.webui.infotext import from_infotext, hashes_of
from tests.hosts_real.server import Server

SUBJECT_ONLY = "alpha=0:beta=0:text_encoder=subject"
STYLE_ONLY = "alpha=0:beta=1000000:text_encoder=style"
SIDES = "<klora:subj_te*0.6 + subj_all*-0.5:style + style_te_peft*0.7:0.8>"
EVERYTHING = (
    "<klora:subj_te*0.6 + subj_all*0.5:style + style_te_peft*0.7:0.8:balance=0.5:subject_to=0.7:style_from=0.2"
    ":subject_blocks=up 1=0.5%2C mid=0:style_blocks=OUTALL>"
)


@pytest.mark.parametrize(
    ("forced", "own"),
    [
        (f"<klora:subj*0.6 + subj_all*0.4:style:{SUBJECT_ONLY}>", "<lora:subj:0.6><lora:subj_all:0.4>"),
        (f"<klora:subj:style_all*0.5 + style*-0.4:{STYLE_ONLY}>", "<lora:style_all:0.5><lora:style:-0.4>"),
        (f"<klora:subj_te + style_te*0.5:style:0.7:{SUBJECT_ONLY}>", "<lora:subj_te:0.7><lora:style_te:0.35>"),
        (f"<klora:subj:style_te*0.5 + subj_te:1:0.7:{STYLE_ONLY}>", "<lora:style_te:0.35><lora:subj_te:0.7>"),
    ],
    ids=["subject", "style", "subject with text encoders", "style with text encoders"],
)
def test_a_forced_side_of_two_is_two_plain_loras(server: Server, forced: str, own: str) -> None:
    expected = server.txt2img(own)
    assert server.txt2img(forced).distance(expected) <= 1
    assert expected.distance(server.txt2img(own.partition(">")[2])) > 5


def test_the_order_of_a_side_does_not_matter(server: Server) -> None:
    first = server.txt2img("<klora:subj*0.6 + subj_all*0.4:style>")
    assert server.txt2img("<klora:subj_all*0.4+subj*0.6:style>").same(first)
    assert not server.txt2img("<klora:subj*0.6:style>").same(first)


@pytest.mark.parametrize("tag", [SIDES, EVERYTHING], ids=["sides", "windows and blocks too"])
def test_a_picture_s_text_makes_the_picture_again(server: Server, tag: str) -> None:
    picture = server.txt2img(tag)
    assert picture.comments == ""
    again = server.pasted(picture)
    assert again.same(picture)
    assert again.infotext == picture.infotext
    # What the text fills in, without the tag.
    filled = {name: text_of(value) for name, value in from_infotext({"Prompt": tag}).items()}
    called = server.txt2img(alwayson_scripts={"K-LoRA": {"args": [filled]}})
    assert called.same(picture)


def test_the_text_has_the_hash_of_each_file_of_a_side(server: Server) -> None:
    line = server.txt2img(SIDES).infotext.partition('Lora hashes: "')[2].partition('"')[0]
    assert hashes_of({"Lora hashes": line}).keys() == {"subj_te", "subj_all", "style", "style_te_peft"}


def test_the_routes_take_sides(server: Server) -> None:
    side = [{"name": "subj_te", "weight": 0.6}, "subj_all"]
    found = server.call("/klora/v1/analyze", {"subject": side, "style": "style + style_te*0.5", "style_from": 0.5})
    files = [[(one["file"], one["weight"]) for one in found[name]["loras"]] for name in ("subject", "style")]
    assert files == [
        [("subj_te.safetensors", 0.6), ("subj_all.safetensors", 1)],
        [("style.safetensors", 1), ("style_te.safetensors", 0.5)],
    ]
    assert {letters[0] for module in found["modules"] if (letters := module["selection"])} == {"c"}


@pytest.mark.parametrize(("closed", "other"), [("subject_to=0", "style"), ("style_from=1", "subj")])
def test_a_window_that_is_never_open_leaves_the_other_alone(server: Server, closed: str, other: str) -> None:
    for policy in ("k-lora", "direct", "composite"):
        alone = server.txt2img(f"<klora:subj:style:policy={policy}:{closed}>")
        assert alone.distance(server.txt2img(f"<lora:{other}:1>")) <= 1, policy


def test_windows_that_meet_hand_over_at_that_place_of_the_schedule(server: Server) -> None:
    # S(τ) = 2·τ + 0.01 is above 1 from the middle on.
    switched = server.txt2img("<klora:subj:style:policy=fixed:alpha=2:beta=0.01>")
    assert server.txt2img("<klora:subj:style:subject_to=0.5:style_from=0.5>").same(switched)


def test_blocks_act_with_their_multipliers(server: Server) -> None:
    half = server.txt2img(f"<klora:subj_te:style:{SUBJECT_ONLY}:subject_blocks=ALL0.5>")
    assert half.distance(server.txt2img("<lora:subj_te:0.5>")) <= 1
    none = server.txt2img("<klora:subj:style:subject_blocks=NONE>")
    assert none.distance(server.txt2img("<lora:style:1>")) <= 1
    preset = server.txt2img("<klora:subj_all:style_all:subject_blocks=OUTALL:style_blocks=INALL>")
    vectors = ":subject_blocks=1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1:style_blocks=1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0"
    assert server.txt2img(f"<klora:subj_all:style_all{vectors}>").same(preset)


def test_a_grid_over_sides_windows_and_blocks(server: Server) -> None:
    axes = [
        ("[K-LoRA] Subject", "subj, subj*0.5 + subj_all"),
        ("[K-LoRA] Style from", "0.5"),
        ("[K-LoRA] Style by block", 'OUTALL, "up 1: 0.5, mid: 0"'),
    ]
    grid = server.plot(axes, "<klora:subj_te:style>")
    expected = [
        server.txt2img(f"<klora:{subject}:style:style_from=0.5:style_blocks={blocks}>").pixels
        for blocks in ("OUTALL", "up 1=0.5%2C mid=0")
        for subject in ("subj", "subj*0.5 + subj_all")
    ]
    assert [(one == other).all() for one, other in zip(grid.all[-4:], expected, strict=True)] == [True] * 4
