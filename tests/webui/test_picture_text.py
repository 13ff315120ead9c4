"""The text of a picture says what acted in that picture, in each of its passes, at the steps that were made."""

from __future__ import annotations

import copy
from typing import Any

import torch

from klora.webui.injection import PLANS
from klora.webui.picture_text import begin_job, keep_for_job
from tests.webui.fake_host import FakeHost
from tests.webui.fake_model import SIZE
from tests.webui.fake_processing import Processing
from tests.webui.hosts import TAG, host, nothing_left, plain

__all__ = ["host", "nothing_left", "plain"]


def text_of(host: FakeHost, prompt: str, **values: Any) -> dict[str, str]:
    p = Processing(host, prompt, **values)
    host.process(p)
    return ours(p)


def ours(p: Any) -> dict[str, str]:
    found = {key: value for key, value in p.extra_generation_params.items() if key.startswith("K-LoRA")}
    return {key.removeprefix("K-LoRA "): str(value) for key, value in found.items()}


def test_a_later_prompt_of_the_same_job_has_nothing_of_an_earlier_one(host: FakeHost) -> None:
    job = Processing(host, "")
    texts = []
    for prompt in (f"a dog {TAG}", "a dog", "a dog <klora:dog:nobody>", "a cat", f"a dog {TAG}"):
        # As the host's script does: a shallow copy, whose dictionary of keys is the job's.
        cell = copy.copy(job)
        cell.all_prompts = [prompt]
        host.process(cell)
        texts.append(ours(cell))
    assert texts[0] == texts[4] != {}
    assert texts[1] == texts[3] == {}
    assert texts[2].keys() == {"error"}


def test_what_holds_for_the_whole_job_is_in_each_of_its_texts_and_in_no_other_job_s(host: FakeHost) -> None:
    p = Processing(host, "a dog")
    begin_job(p)
    p.extra_generation_params["K-LoRA error"] = "beta: much is not a number"
    keep_for_job(p)
    host.process(p)
    assert ours(p) == {"error": "beta: much is not a number"}
    p.all_prompts = [f"a dog {TAG}"]
    host.process(p)
    assert {"error", "scale", "subject share"} <= ours(p).keys()
    begin_job(p)
    assert ours(p) == {}


def test_each_pass_tells_its_own(host: FakeHost) -> None:
    one = text_of(host, f"a dog {TAG}")
    same = text_of(host, f"a dog {TAG}", hr_prompt="")
    assert same.pop("hires subject share") != one["subject share"]
    assert same == one
    other = text_of(host, f"a dog {TAG}", hr_prompt="a dog <klora:dog:ink:alpha=0:beta=0>")
    assert (other["alpha"], other["hires alpha"], other["hires subject share"]) == ("1.5", "0", "100.0%")
    assert "hires scale" not in other
    assert text_of(host, f"a dog {TAG}", hr_prompt="a dog") == {**one, "hires": "off"}
    late = text_of(host, "a dog", hr_prompt=f"a dog {TAG}")
    assert all(key.startswith("hires ") for key in late)
    first = text_of(host, "a dog <klora:dog:ink:passes=first>", hr_prompt="")
    assert first["hires policy"] == "direct"


def test_a_share_is_that_of_the_steps_that_were_made(host: FakeHost) -> None:
    p = Processing(host, f"a dog {TAG}", init_images=torch.zeros(1, SIZE), denoising_strength=0.4, steps=10)
    host.process(p)
    (plan,) = getattr(p, PLANS)
    assert (plan.steps, plan.made) == (10, range(5, 10))
    shares = plan.subject_share()
    assert ours(p)["subject share"] == f"{sum(shares[5:]) / 5:.1%}" != f"{sum(shares) / 10:.1%}"


def test_an_interrupted_picture_tells_of_the_steps_before(host: FakeHost) -> None:
    def interrupt(number: int) -> None:
        host.interrupted = number >= 2

    p = Processing(host, f"a dog {TAG}")
    host.in_unet = interrupt
    host.process(p)
    host.interrupted = False
    (plan,) = getattr(p, PLANS)
    assert plan.made == range(2)


def test_a_fusion_that_never_acted_claims_nothing(host: FakeHost) -> None:
    def lose_the_schedule(p: Any, denoiser: Any) -> None:
        vars(denoiser).pop("sampler", None)

    host.before_evaluation = lose_the_schedule
    assert text_of(host, f"a dog {TAG}").keys() == {"error"}


def test_a_policy_that_chooses_nothing_has_no_share_and_no_scale(host: FakeHost) -> None:
    text = text_of(host, "a dog <klora:dog:ink:policy=direct>")
    assert text == {"policy": "direct", "scope": "all"}
