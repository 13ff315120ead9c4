"""What a user of a WebUI does not expect of an extension, and no longer meets."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest

from tests.hosts_real.server import PROMPT, ApiError, Picture, Server

TAG = "<klora:subj:style>"
PAIR = {"subject": "subj", "style": "style"}
ONCE = "K-LoRA alone applies it"


def keys(picture: Picture, index: int = 0) -> dict[str, str]:
    """What the text of one picture says of K-LoRA."""
    line = picture.info["infotexts"][index].splitlines()[-1]
    return dict(re.findall(r"K-LoRA ([\w ]+): ([^,]+)", line))


def with_map(values: dict[str, Any]) -> dict[str, Any]:
    return {"alwayson_scripts": {"K-LoRA": {"args": [{**values, "show_map": True}]}}}


def test_a_map_is_no_picture_to_a_script(server: Server, plain: Picture) -> None:
    pytest.importorskip("matplotlib")
    assert len(server.txt2img(**with_map(PAIR)).all) == 2
    grid = server.script("prompt matrix", "|red", **with_map(PAIR))
    assert grid.same(server.script("prompt matrix", f"{TAG}|red")) or len(grid.all) == 3
    tiles, loops = {"Tile overlap": 16}, {"Loops": 2}
    upscaled = server.script("sd upscale", "", tiles, plain, **with_map(PAIR))
    assert upscaled.same(server.script("sd upscale", TAG, tiles, plain))
    looped = server.script("loopback", "", loops, plain, **with_map(PAIR))
    assert len(looped.all) == len(server.script("loopback", "", loops, plain).all)


def test_a_map_is_no_picture_to_outpainting(server: Server, plain: Picture) -> None:
    pytest.importorskip("matplotlib")
    name, controls = "poor man's outpainting", {"Pixels to expand": 32, "Outpainting direction": ["left"]}
    if name not in {one["name"] for one in server.call("/sdapi/v1/script-info")}:
        pytest.skip(f"{server.kind} has no {name}")

    def outpainted(tags: str, **changes: Any) -> Picture:
        # Where a host inpaints it draws from numbers that its seed does not set.
        server.call("/klora-probe/seed")
        return server.script(name, tags, controls, plain, **changes)

    assert outpainted("", **with_map(PAIR)).same(outpainted(TAG))


@pytest.mark.parametrize("hires", [False, True], ids=["one pass", "hires"])
def test_a_network_that_the_host_adds_by_itself_is_applied_once(server: Server, hires: bool) -> None:
    make = server.hires if hires else server.txt2img
    expected = make(TAG)
    server.options(sd_lora="subj")
    try:
        picture = make(TAG)
    finally:
        server.options(sd_lora="None")
    assert picture.same(expected)
    assert ONCE in picture.comments


def test_a_tag_of_the_pair_s_own_file_is_gone(server: Server) -> None:
    expected = server.txt2img(TAG)
    for tags in (f"{TAG}<lora:subj:1>", f"<lora:subj:0.5>{TAG}<lora:style:1>"):
        picture = server.txt2img(tags)
        assert picture.same(expected)
        assert ONCE in picture.comments
    assert server.txt2img("<lora:subj:1>").distance(server.txt2img("<klora:subj:style:alpha=0:beta=0>")) <= 1


def test_a_text_is_of_its_own_picture(server: Server) -> None:
    prompts = "\n".join(f"{PROMPT} {tag}" for tag in (TAG, "", "<klora:subj:nobody>", ""))
    made = server.script("prompts from file or textbox", "", {"List of prompt inputs": prompts})
    texts = [keys(made, i) for i in range(4)]
    assert "subject share" in texts[0]
    assert texts[1] == texts[3] == {}
    assert texts[2].keys() == {"error"}
    matrix = server.script("prompt matrix", f"|{TAG}|red")
    assert [bool(keys(matrix, i)) for i in range(1, 5)] == [False, True, False, True]


def test_each_pass_tells_what_acted_at_the_steps_it_made(server: Server, plain: Picture) -> None:
    one, two = keys(server.txt2img(TAG)), keys(server.hires(TAG))
    assert two.pop("hires subject share") != one["subject share"]
    assert two == one
    late = keys(server.img2img(plain, TAG, denoising_strength=0.2, steps=20))
    assert float(late["subject share"].rstrip("%")) < float(one["subject share"].rstrip("%"))
    assert keys(server.txt2img("<klora:subj:style:policy=direct>")) == {"policy": "direct", "scope": "all"}


def test_no_pair_is_off(server: Server, plain: Picture) -> None:
    picture = server.txt2img(alwayson_scripts={"K-LoRA": {"args": [True, "None", "None"]}})
    assert picture.same(plain)
    assert keys(picture) == {}
    assert picture.comments == ""


@pytest.mark.parametrize(
    ("axes", "tag", "says"),
    [
        ([("[K-LoRA] Balance", "-1, 9")], TAG, "at most 2"),
        ([("[K-LoRA] α", "1, 0"), ("[K-LoRA] Scale", "s, s*")], TAG, "alpha"),
        ([("[K-LoRA] Style", "style, nobody")], TAG, "nobody"),
        ([("[K-LoRA] Balance", "-1, 1")], "", "needs a pair"),
    ],
)
def test_a_bad_grid_is_refused_before_its_first_picture(
    server: Server, axes: list[tuple[str, str]], tag: str, says: str
) -> None:
    with pytest.raises(ApiError, match=says) as refused:
        server.plot(axes, tag)
    assert refused.value.status == 422


@pytest.mark.parametrize(
    "changes", [{"prompt": "<KLORA:subj:style>"}, {"prompt": "<klora:subj:style"}, {"negative_prompt": TAG}]
)
def test_what_is_no_tag_is_noted_in_the_text(server: Server, changes: dict[str, str]) -> None:
    assert "K-LoRA note" in server.txt2img(**changes).infotext


@pytest.mark.parametrize("name", ["a=b", "c:d", "<b>"])
def test_any_name_of_a_file_will_do(server: Server, name: str) -> None:
    folder = server.data / "models" / "Lora"
    path = folder / f"{name}.safetensors"
    shutil.copy(folder / "subj.safetensors", path)
    server.call("/sdapi/v1/refresh-loras", {})
    try:
        picture = server.txt2img(alwayson_scripts={"K-LoRA": {"args": [{**PAIR, "subject": name}]}})
        assert picture.comments == ""
        assert picture.same(server.txt2img(TAG))
    finally:
        path.unlink()
        server.call("/sdapi/v1/refresh-loras", {})


def test_an_analysis_is_for_the_steps_asked_for(server: Server) -> None:
    assert server.call("/klora/v1/analyze", {**PAIR, "steps": 7})["steps"] == 7


def test_a_pair_for_another_model_is_named_in_words(server: Server) -> None:
    if server.sdxl_model is None:
        pytest.skip("no SDXL checkpoint")
    server.options(sd_model_checkpoint=server.sdxl_model.path.name)
    try:
        assert "this pair is for SD 1, the checkpoint is SDXL" in server.txt2img(TAG).comments
    finally:
        server.options(sd_model_checkpoint=server.model.path.name)


@pytest.mark.parametrize("policy", ["composite", "cm-lora"])
def test_a_policy_of_several_predictions_acts_and_repeats(server: Server, plain: Picture, policy: str) -> None:
    tag = f"<klora:subj:style:policy={policy}>"
    picture = server.txt2img(tag)
    assert picture.comments == ""
    assert not picture.same(plain)
    assert server.txt2img(tag).same(picture)
    # Of one LoRA twice each prediction is the same; CMLoRA keeps some from earlier steps.
    twice = server.txt2img(f"<klora:subj:subj_peft:policy={policy}:refresh=1>")
    assert twice.distance(server.txt2img("<lora:subj:1>")) <= 1


def test_every_argument_has_a_label(server: Server) -> None:
    listed = server.call("/sdapi/v1/script-info")
    assert all(arg["label"] for one in listed if one["name"] == "k-lora" for arg in one["args"])
