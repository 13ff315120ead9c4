"""Sides of several LoRAs, when and where they act, whole differences, and pasted texts, against SD.Next's own LoRAs."""

from __future__ import annotations

import pytest

from klora.webui.args import text_of
from klora.webui.infotext import PASTERS, from_infotext
from tests.hosts_real.sdnext.server import SdnextServer
from tests.hosts_real.sdnext.test_pictures import without_template
from tests.hosts_real.server import Picture

SUBJECT_ONLY = "alpha=0:beta=0:text_encoder=none"
STYLE_ONLY = "alpha=0:beta=1000000:text_encoder=none"
EVERYTHING = (
    "<klora:sd_subject*0.6 + sd_more_subject*0.5:sd_style + sd_more_style*0.7:0.8:balance=0.5:subject_to=0.7"
    ":style_from=0.2:subject_blocks=up 1=0.5%2C mid=0:style_blocks=down 2=0.3>"
)
BLOCKS = ("down 0", "down 1", "down 2", "mid", "up 1", "up 2", "up 3")


@pytest.mark.parametrize(
    ("forced", "own"),
    [
        (f"sd_subject*0.6 + sd_more_subject*0.4:sd_style:{SUBJECT_ONLY}", "sd_subject:0.6 sd_more_subject:0.4"),
        (f"sd_subject:sd_style*0.5 + sd_more_style*-0.4:1:0.8:{STYLE_ONLY}", "sd_style:0.4 sd_more_style:-0.32"),
        (f"sd_subject_full*0.7 + sd_more_style:sd_style:{SUBJECT_ONLY}", "sd_subject_full:0.7 sd_more_style:1"),
    ],
    ids=["subject", "style", "of whole differences"],
)
def test_a_forced_side_of_two_is_two_plain_loras(sdnext: SdnextServer, plain: Picture, forced: str, own: str) -> None:
    first, second = (f"<lora:{one}>" for one in own.split())
    expected = sdnext.txt2img(first + second)
    assert sdnext.txt2img(f"<klora:{forced}>").distance(expected) <= 1
    assert expected.distance(sdnext.txt2img(second)) > 5


def test_whole_differences_act_as_the_host_s_own(sdnext: SdnextServer, plain: Picture) -> None:
    subject, style = (sdnext.txt2img(f"<lora:sd_{side}_full:1>") for side in ("subject", "style"))
    assert min(subject.distance(plain), style.distance(plain), subject.distance(style)) > 5
    both = sdnext.txt2img("<lora:sd_subject_full:1><lora:sd_style_full:1>")
    assert sdnext.txt2img("<klora:sd_subject_full:sd_style_full:policy=direct>").distance(both) <= 1


def test_norms_act_as_if_merged(sdnext: SdnextServer, plain: Picture) -> None:
    # The host's own LoRA code makes something else of them.
    sdnext.use("sd_merged")
    merged = sdnext.txt2img()
    sdnext.use("sd")
    tag = f"<klora:sd_subject_norms:sd_style:{SUBJECT_ONLY}>"
    assert sdnext.txt2img(tag).distance(merged) <= 1
    assert merged.distance(sdnext.txt2img(tag.replace("_norms", "_full"))) > 5


def test_whole_differences_and_norms_in_a_compiled_and_in_an_offloaded_model(
    sdnext: SdnextServer, plain: Picture
) -> None:
    tag = "<klora:sd_subject_norms:sd_style_norms>"
    whole = sdnext.txt2img(tag)
    sdnext.use("sd_other")
    sdnext.use("sd")
    sdnext.call("/klora-probe/compile_denoiser")
    sdnext.txt2img()
    assert sdnext.txt2img(tag).distance(whole) <= 1
    sdnext.options(diffusers_offload_mode="balanced")
    try:
        sdnext.use("sd_other")
        sdnext.use("sd")
        assert sdnext.txt2img(tag).distance(whole) <= 1
    finally:
        sdnext.options(diffusers_offload_mode="none")
        sdnext.use("sd_other")


def test_the_order_of_a_side_does_not_matter(sdnext: SdnextServer, plain: Picture) -> None:
    first = sdnext.txt2img("<klora:sd_subject*0.6 + sd_more_subject*0.4:sd_style>")
    assert sdnext.txt2img("<klora:sd_more_subject*0.4+sd_subject*0.6:sd_style>").same(first)
    assert not sdnext.txt2img("<klora:sd_subject*0.6:sd_style>").same(first)


@pytest.mark.parametrize(("closed", "other"), [("subject_to=0", "sd_style"), ("style_from=1", "sd_subject")])
def test_a_window_that_is_never_open_leaves_the_other_alone(
    sdnext: SdnextServer, plain: Picture, closed: str, other: str
) -> None:
    expected = sdnext.txt2img(f"<lora:{other}:1>")
    for policy in ("k-lora", "direct", "composite"):
        alone = sdnext.txt2img(f"<klora:sd_subject:sd_style:policy={policy}:{closed}>")
        assert alone.distance(expected) <= 1, policy


def test_windows_that_meet_hand_over_at_that_place_of_the_schedule(sdnext: SdnextServer, plain: Picture) -> None:
    # S(τ) = 2·τ + 0.01 is above 1 from the middle on.
    switched = sdnext.txt2img("<klora:sd_subject:sd_style:policy=fixed:alpha=2:beta=0.01>")
    assert sdnext.txt2img("<klora:sd_subject:sd_style:subject_to=0.5:style_from=0.5>").same(switched)


def test_blocks_act_with_their_multipliers(sdnext: SdnextServer, plain: Picture) -> None:
    half, none = ("%2C ".join(f"{block}={value}" for block in BLOCKS) for value in (0.5, 0))
    picture = sdnext.txt2img(f"<klora:sd_subject:sd_style:{SUBJECT_ONLY}:subject_blocks={half}>")
    assert picture.distance(sdnext.txt2img("<lora:sd_subject:0.5>")) <= 1
    picture = sdnext.txt2img(f"<klora:sd_subject:sd_style:subject_blocks={none}>")
    assert picture.distance(sdnext.txt2img("<lora:sd_style:1>")) <= 1
    picture = sdnext.txt2img("<klora:sd_subject:sd_style:subject_blocks=up 9=1>")
    assert "is no block of these LoRAs" in picture.comments
    assert "K-LoRA error" in picture.infotext


def test_a_picture_s_text_makes_the_picture_again(sdnext: SdnextServer, plain: Picture) -> None:
    picture = sdnext.txt2img(EVERYTHING)
    assert picture.comments == ""
    found = sdnext.call("/sdapi/v1/png-info", {"image": picture.encoded[0]})["parameters"]
    filled = {name: value for name, paste in PASTERS.items() if (value := paste(found)) is not None}
    body = {"prompt": found["Prompt"], "steps": int(found["Steps"]), "seed": int(found["Seed"])}
    again = sdnext.txt2img(alwayson_scripts={"K-LoRA": {"args": [filled]}}, **body)
    assert again.same(picture)
    assert without_template(again) == without_template(picture)
    # What the text fills in, without the tag.
    values = {name: text_of(value) for name, value in from_infotext({"Prompt": EVERYTHING}).items()}
    assert sdnext.txt2img(alwayson_scripts={"K-LoRA": {"args": [values]}}).same(picture)


def test_the_text_has_the_hash_of_each_file_of_a_side_where_the_host_writes_hashes(
    sdnext: SdnextServer, plain: Picture
) -> None:
    assert "Lora hashes" not in sdnext.txt2img(EVERYTHING).infotext
    sdnext.options(lora_add_hashes_to_infotext=True)
    try:
        line = sdnext.txt2img(EVERYTHING).infotext.partition('Lora hashes: "')[2].partition('"')[0]
    finally:
        sdnext.options(lora_add_hashes_to_infotext=False)
    assert [one.partition(":")[0] for one in line.split(", ")] == [
        "sd_subject",
        "sd_more_subject",
        "sd_style",
        "sd_more_style",
    ]


def test_the_routes_take_sides(sdnext: SdnextServer, plain: Picture) -> None:
    side = [{"name": "sd_subject", "weight": 0.6}, "sd_more_subject"]
    body = {"subject": side, "style": "sd_style + sd_more_style*0.5", "style_from": 0.5}
    found = sdnext.call("/klora/v1/analyze", body)
    files = [[(one["file"], one["weight"]) for one in found[name]["loras"]] for name in ("subject", "style")]
    assert files == [
        [("sd_subject.safetensors", 0.6), ("sd_more_subject.safetensors", 1)],
        [("sd_style.safetensors", 1), ("sd_more_style.safetensors", 0.5)],
    ]
    assert {letters[0] for module in found["modules"] if (letters := module["selection"])} == {"c"}


@pytest.mark.parametrize("script", ["xyz grid", "xyz grid script"])
def test_a_grid_over_sides_windows_and_blocks(sdnext: SdnextServer, plain: Picture, script: str) -> None:
    axes = [
        ("[K-LoRA] Subject", "sd_subject, sd_subject*0.5 + sd_more_subject"),
        ("[K-LoRA] Style from", "0.5"),
        ("[K-LoRA] Style by block", "mid: 0"),
    ]
    grid = sdnext.plot(script, axes, "<klora:sd_more_subject:sd_style>")
    expected = [
        sdnext.txt2img(f"<klora:{subject}:sd_style:style_from=0.5:style_blocks=mid=0>").pixels
        for subject in ("sd_subject", "sd_subject*0.5 + sd_more_subject")
    ]
    assert [(one == other).all() for one, other in zip(grid.all[-2:], expected, strict=True)] == [True] * 2
