"""Hires, img2img, inpaint, AND, CFG 1, batches."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests.hosts_real.server import Picture, Server

TAG = "<klora:subj:style>"
DIRECT = "<klora:subj:style:policy=direct>"
FORCED = "<klora:subj:style:alpha=0:beta=0>"
PLAIN_SUBJECT = "<lora:subj:1>"


def _mask(picture: Picture) -> str:
    height, width, _ = picture.pixels.shape
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[:, : width // 2] = 255
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_hires_fuses_both_passes(server: Server) -> None:
    assert server.hires(FORCED).distance(server.hires(PLAIN_SUBJECT)) <= 1
    taus = server.taus(lambda: server.hires(TAG))
    steps = server.defaults["steps"]
    assert taus[:steps] == pytest.approx([i / steps for i in range(steps)])
    # The second pass is the end of a schedule of its own.
    assert taus[steps] > 0.2
    assert all(0 <= tau <= 1 for tau in taus)


def test_the_hires_prompt_may_hold_another_tag(server: Server) -> None:
    prompt = server.defaults["prompt"]
    other = server.hires(FORCED, hr_prompt=f"{prompt} <klora:subj:style:alpha=0:beta=1000000>")
    assert other.distance(server.hires(PLAIN_SUBJECT, hr_prompt=f"{prompt} <lora:style:1>")) <= 1


def test_the_hires_prompt_may_hold_no_tag(server: Server) -> None:
    prompt = server.defaults["prompt"]
    none = server.hires(FORCED, hr_prompt=f"{prompt} at night")
    assert none.distance(server.hires(PLAIN_SUBJECT, hr_prompt=f"{prompt} at night")) <= 1


def test_only_the_hires_prompt_may_hold_a_tag(server: Server) -> None:
    prompt = server.defaults["prompt"]
    only = server.hires(hr_prompt=f"{prompt} at night {FORCED}")
    assert only.distance(server.hires(hr_prompt=f"{prompt} at night {PLAIN_SUBJECT}")) <= 1


def test_a_pass_left_out_applies_the_pair_as_plain_loras(server: Server) -> None:
    prompt = server.defaults["prompt"]
    first = server.hires("<klora:subj:style:passes=first>")
    assert first.distance(server.hires(TAG, hr_prompt=f"{prompt} {DIRECT}")) <= 1
    hires = server.hires("<klora:subj:style:passes=hires>")
    assert hires.distance(server.hires(DIRECT, hr_prompt=f"{prompt} {TAG}")) <= 1
    assert not first.same(hires)


def test_img2img_starts_where_its_noise_is(server: Server, plain: Picture) -> None:
    assert server.img2img(plain, FORCED).distance(server.img2img(plain, PLAIN_SUBJECT)) <= 1
    assert not server.img2img(plain, TAG).same(server.img2img(plain))

    def start(sampler: str, **changes: object) -> float:
        settings = {"steps": 20, "denoising_strength": 0.4, "sampler_name": sampler}
        return server.taus(lambda: server.img2img(plain, changes.pop("tag", TAG), **settings))[0]

    # 20 steps at 0.4: the last 9 of a k-diffusion schedule (A1111 and Forge keep one more than 8).
    assert start("Euler") == pytest.approx(0.55, abs=0.01)
    assert start("DDIM") == pytest.approx(0.6, abs=0.03)
    assert start("Euler", tag="<klora:subj:style:progress=relative>") == 0


def test_inpaint(server: Server, plain: Picture) -> None:
    mask = _mask(plain)

    def inpaint(tag: str) -> Picture:
        # Forge draws some of its noise from a generator that no seed of a picture sets.
        server.call("/klora-probe/seed")
        return server.img2img(plain, tag, mask=mask)

    assert inpaint(FORCED).distance(inpaint(PLAIN_SUBJECT)) <= 1
    assert not inpaint(TAG).same(inpaint(""))


def test_several_prompts_at_once(server: Server) -> None:
    prompts = {"prompt": f"{server.defaults['prompt']} AND a red car :0.7 AND snow"}
    assert server.txt2img(FORCED, **prompts).distance(server.txt2img(PLAIN_SUBJECT, **prompts)) <= 1
    taus = server.taus(lambda: server.txt2img(TAG, **prompts))
    steps = server.defaults["steps"]
    assert taus == pytest.approx([i / steps for i in range(steps)])


def test_a_long_prompt_beside_a_short_negative(server: Server) -> None:
    long = {"prompt": "a photo of a dog, " * 30}
    assert server.txt2img(FORCED, **long).distance(server.txt2img(PLAIN_SUBJECT, **long)) <= 1


def test_cfg_1(server: Server) -> None:
    assert server.txt2img(FORCED, cfg_scale=1).distance(server.txt2img(PLAIN_SUBJECT, cfg_scale=1)) <= 1


def test_batches(server: Server) -> None:
    batches = {"batch_size": 2, "n_iter": 2}
    assert server.txt2img(FORCED, **batches).distance(server.txt2img(PLAIN_SUBJECT, **batches)) <= 1
    found: list[Picture] = []
    taus = server.taus(lambda: found.append(server.txt2img(TAG, **batches)))
    steps = server.defaults["steps"]
    # Every batch begins anew.
    assert taus == pytest.approx([i / steps for i in range(steps)] * 2)
    single = server.txt2img(TAG)
    assert abs(found[0].all[-4].astype(int) - single.pixels).max() <= 1


def test_beside_a_wrapper_around_the_model(server: Server) -> None:
    alone = server.txt2img(TAG)
    server.call("/klora-probe/wrap", on=True)
    try:
        assert server.txt2img(TAG).same(alone)
    finally:
        calls = server.call("/klora-probe/wrap", on=False)
    assert calls >= server.defaults["steps"]
