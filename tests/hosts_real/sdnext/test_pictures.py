"""What a tag, the accordion and a grid make of SD.Next's pictures, against its own LoRAs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.hosts_real.sdnext.server import STEPS, SdnextServer
from tests.hosts_real.server import ApiError, Picture

TAG = "<klora:sd_subject:sd_style>"
FORCED = "<klora:sd_subject:sd_style:alpha=0:beta=0>"
SUBJECT = "<lora:sd_subject:1>"
PAIR = {"subject": "sd_subject", "style": "sd_style"}


def accordion(**more: Any) -> dict[str, Any]:
    return {"K-LoRA": {"args": [{**PAIR, **more}]}}


def without_template(picture: Picture) -> list[str]:
    """A picture's text but for the line that keeps the prompt as it was typed."""
    return [line for line in picture.infotext.splitlines() if not line.startswith("Template")]


@pytest.mark.parametrize("model", ["sd", "sdxl", "flux", "z_image"])
def test_forced_sides_are_the_plain_loras_and_direct_is_both(sdnext: SdnextServer, model: str) -> None:
    sdnext.use(model)
    before = sdnext.txt2img()
    subject, style = (sdnext.txt2img(f"<lora:{model}_{side}:1>") for side in ("subject", "style"))
    both = sdnext.txt2img(f"<lora:{model}_subject:1><lora:{model}_style:1>")
    # Further than what counts as equal, of weights that are random.
    assert min(subject.distance(before), style.distance(before), both.distance(subject)) > 1
    pair = f"{model}_subject:{model}_style"
    assert sdnext.txt2img(f"<klora:{pair}:scale=s:alpha=0:beta=0>").distance(subject) <= 1
    assert sdnext.txt2img(f"<klora:{pair}:scale=s:alpha=0:beta=1e6>").distance(style) <= 1
    assert sdnext.txt2img(f"<klora:{pair}:policy=direct>").distance(both) <= 1
    found: list[Picture] = []
    taus = sdnext.taus(lambda: found.append(sdnext.txt2img(f"<klora:{pair}>")))
    assert taus == pytest.approx([i / STEPS for i in range(STEPS)], abs=1e-6)
    assert min(found[0].distance(subject), found[0].distance(style)) > 1
    assert sdnext.txt2img().same(before)


def test_a_text_part_acts_as_the_host_s_own(sdnext: SdnextServer, plain: Picture) -> None:
    tag = "<klora:sd_subject_text:sd_style_text:alpha=0:beta=0:text_encoder=subject>"
    forced = sdnext.txt2img(tag)
    assert not forced.same(sdnext.txt2img(tag.replace("=subject>", "=none>")))
    sdnext.options(lora_apply_te=True)
    try:
        assert forced.distance(sdnext.txt2img("<lora:sd_subject_text:1>")) <= 1
    finally:
        sdnext.options(lora_apply_te=False)
        # The host leaves its own in the text encoder from now on.
        sdnext.use("sd_other")


def test_a_peft_pair_and_a_dora_act(sdnext: SdnextServer, plain: Picture) -> None:
    whole = sdnext.txt2img(TAG)
    assert sdnext.txt2img("<klora:sd_subject_peft:sd_style_peft>").distance(whole) <= 1
    forced = sdnext.txt2img("<klora:sd_subject_dora:sd_style:alpha=0:beta=0>")
    assert forced.distance(plain) > 5
    assert forced.distance(sdnext.txt2img(FORCED)) > 5


def test_hires_fuses_both_passes(sdnext: SdnextServer, plain: Picture) -> None:
    assert sdnext.hires(FORCED).distance(sdnext.hires(SUBJECT)) <= 1
    taus = sdnext.taus(lambda: sdnext.hires(TAG))
    assert taus[:STEPS] == pytest.approx([i / STEPS for i in range(STEPS)], abs=1e-6)
    assert taus[STEPS] > 0.2
    whole = sdnext.hires(TAG)
    for passes in ("first", "hires"):
        assert not sdnext.hires(TAG.replace(">", f":passes={passes}>")).same(whole)


def test_a_second_pass_s_own_prompt_has_its_own_tags(sdnext: SdnextServer, plain: Picture) -> None:
    for first, second in ((True, False), (False, True), (True, True)):
        ours, its = (
            sdnext.hires(tag if first else "", refiner_prompt=f"at night {tag if second else ''}")
            for tag in (FORCED, SUBJECT)
        )
        assert ours.distance(its) <= 1


def test_img2img_and_batches(sdnext: SdnextServer, plain: Picture) -> None:
    assert sdnext.img2img(plain, FORCED).distance(sdnext.img2img(plain, SUBJECT)) <= 1
    taus = sdnext.taus(lambda: sdnext.img2img(plain, TAG, steps=20, denoising_strength=0.4))
    assert taus[0] == pytest.approx(0.6, abs=0.05)
    batches = {"batch_size": 2, "n_iter": 2}
    assert sdnext.txt2img(FORCED, **batches).distance(sdnext.txt2img(SUBJECT, **batches)) <= 1


@pytest.mark.parametrize("sampler", ["Euler", "Euler a", "DPM++ 2M", "UniPC", "DDIM", "Heun", "LCM"])
def test_any_sampler(sdnext: SdnextServer, plain: Picture, sampler: str) -> None:
    found: list[Picture] = []
    taus = sdnext.taus(lambda: found.append(sdnext.txt2img(FORCED, sampler_name=sampler)))
    assert found[0].distance(sdnext.txt2img(SUBJECT, sampler_name=sampler)) <= 1
    assert "K-LoRA error" not in found[0].infotext
    assert taus[0] == 0
    assert taus == sorted(taus)


def test_accordion_and_tag_mean_the_same(sdnext: SdnextServer, plain: Picture) -> None:
    tagged = sdnext.txt2img("<klora:sd_subject:sd_style:0.8:scale=s*>")
    called = sdnext.txt2img(alwayson_scripts=accordion(subject_strength=0.8, scale="s*"))
    assert called.same(tagged)
    assert without_template(called) == without_template(tagged)
    assert "K-LoRA scale: s*" in called.infotext
    hires = {"refiner_prompt": "at night"}
    assert sdnext.hires(alwayson_scripts=accordion(), **hires).same(sdnext.hires(TAG, refiner_prompt=f"at night {TAG}"))
    assert len(sdnext.txt2img(alwayson_scripts=accordion(show_map=True)).all) == 2


@pytest.mark.parametrize("script", ["xyz grid", "xyz grid script"])
@pytest.mark.parametrize("by_tag", [True, False], ids=["tag", "accordion"])
def test_a_grid(sdnext: SdnextServer, plain: Picture, script: str, by_tag: bool) -> None:
    asked = {} if by_tag else {"alwayson_scripts": accordion()}
    grid = sdnext.plot(script, [("[K-LoRA] Balance", "-1, 0, 1")], TAG if by_tag else "", **asked)
    assert grid.comments == ""
    expected = [sdnext.txt2img(TAG.replace(">", f":balance={balance}>")).pixels for balance in (-1, 0, 1)]
    assert [(one == other).all() for one, other in zip(grid.all[-3:], expected, strict=True)] == [True] * 3


def test_the_host_s_own_tags_beside(sdnext: SdnextServer, plain: Picture) -> None:
    beside = sdnext.txt2img(f"<lora:sd_other_style:0.5> {FORCED}")
    assert beside.distance(sdnext.txt2img(f"<lora:sd_other_style:0.5> {SUBJECT}")) <= 1
    whole = sdnext.txt2img(TAG)
    for tags in (f"{SUBJECT} {TAG}", f"{TAG} {SUBJECT}"):
        picture = sdnext.txt2img(tags)
        assert picture.distance(whole) <= 1
        assert "K-LoRA alone applies it" in picture.comments


@pytest.mark.parametrize(
    ("tag", "says"),
    [
        ("<klora:sd_subject>", "it must name a subject and a style"),
        ("<klora:sd_subject:nobody>", "there is no LoRA named 'nobody'"),
        ("<klora:sd_subject:sd_style:beta=-1>", "beta"),
        ("<klora:sd_subject:flux_style>", "flux_style"),
    ],
)
def test_a_bad_tag_is_named_and_the_picture_is_made_without(
    sdnext: SdnextServer, plain: Picture, tag: str, says: str
) -> None:
    picture = sdnext.txt2img(tag)
    assert picture.same(plain)
    assert says in picture.comments
    assert "K-LoRA error" in picture.infotext
    assert str(sdnext.data) not in picture.comments + picture.infotext


def test_the_routes(sdnext: SdnextServer, plain: Picture) -> None:
    assert sdnext.call("/klora/v1/version")["version"]
    found = sdnext.call("/klora/v1/analyze", {**PAIR, "picture": True})
    assert found["picture"]
    assert found["warnings"] == []
    with pytest.raises(ApiError) as failed:
        sdnext.call("/klora/v1/analyze", {"subject": "sd_subject", "style": "nobody"})
    assert failed.value.status == 404
