"""`klora.find_balance`: what it asks of a pipeline, and that it leaves it as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import klora
from klora.balance.search import PLACES, SHARES
from klora.demo import catalogue
from klora.errors import KloraError
from klora.generation.balance import cost
from klora.generation.pipeline import load_pipeline
from tests.support.balances import look_at_fewer
from tests.support.lora_files import write_lora
from tests.support.models import module_shapes
from tests.support.other_pipelines import CALL, make

STEPS = 5
GUIDED: dict[str, Any] = {"call": {"guidance_scale": 2.5}}


@pytest.fixture(scope="module")
def pipe() -> Any:
    known = catalogue.read_catalogue(catalogue.HOME)
    made = load_pipeline(str(catalogue.HOME / known["model"]), torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def pair() -> catalogue.DemoPair:
    return catalogue.demo_pair(catalogue.read_catalogue(catalogue.HOME), catalogue.HOME, "bolt", "pinstripe")


def find(pipe: Any, pair: catalogue.DemoPair, **more: Any) -> Any:
    return klora.find_balance(pipe, *pair.files, **{"prompt": pair.prompts["both"], "steps": STEPS, **GUIDED, **more})


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> tuple[float, ...]:
    """Fewer pictures and places, where it matters not how many there are; gives the shares of the pictures."""
    return look_at_fewer(monkeypatch)


def test_two_steps_are_enough(pipe: Any, pair: catalogue.DemoPair, few: tuple[float, ...]) -> None:
    assert find(pipe, pair, steps=2).share in few


def test_the_pipeline_is_as_before_and_all_work_is_told(
    pipe: Any, pair: catalogue.DemoPair, few: tuple[float, ...]
) -> None:
    weights = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    random, told = torch.get_rng_state(), []
    found = find(pipe, pair, on_stage=lambda what, done: told.append((what, done)))
    assert found.share in few
    assert [candidate.share for candidate in found.candidates] == list(few)
    assert len(found.images) == len(few)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(weight, weights[name]) for name, weight in pipe.unet.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())
    assert [what for what, _ in told][: len(few)] == [f"share {share:g}" for share in few]
    dones = [done for _, done in told]
    assert dones == sorted(dones)
    assert dones[-1] == pytest.approx(cost(STEPS))


def test_each_lora_judges_under_its_own_prompt(
    pipe: Any, pair: catalogue.DemoPair, monkeypatch: pytest.MonkeyPatch, few: tuple[float, ...]
) -> None:
    prompts: list[str] = []
    original = type(pipe).encode_prompt

    def encode(self: Any, prompt: str, *args: Any, **kwargs: Any) -> Any:
        prompts.append(prompt)
        return original(self, prompt, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "encode_prompt", encode)
    find(pipe, pair, subject_prompt=pair.prompts["subject"], style_prompt=pair.prompts["style"])
    both = pair.prompts["both"]
    # One look at what the denoiser is shown, the pictures, and then each judge.
    assert prompts == [both, *[both] * len(few), both, pair.prompts["subject"], pair.prompts["style"]]


def test_an_interrupt_leaves_no_hook(pipe: Any, pair: catalogue.DemoPair, few: tuple[float, ...]) -> None:
    def stop(what: str, _done: float) -> None:
        if what == "judging":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find(pipe, pair, on_stage=stop)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())


def test_a_pipeline_that_shows_no_latents_is_an_error_in_words(pair: catalogue.DemoPair) -> None:
    class Closed:
        def __call__(self, prompt: str) -> None: ...

    with pytest.raises(KloraError, match="Closed does not show its latents"):
        find(Closed(), pair)


def test_a_denoiser_that_is_shown_lists_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    pipe, options = make("z_image")
    names = {name: shape for name, shape in module_shapes(pipe.transformer).items() if name.endswith("to_q")}
    files = [write_lora(tmp_path / f"{seed}.safetensors", names, "peft", seed=seed) for seed in (1, 2)]
    calls: list[int] = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(KloraError, match="ZImagePipeline"):
        klora.find_balance(pipe, *files, prompt=None, call={**CALL, **options})
    assert not calls


def test_it_costs_no_more_than_seven_pictures_at_the_default_steps() -> None:
    assert cost(klora.Settings().steps) <= 7
    assert cost(30) == len(SHARES) + 3 * len(SHARES) * len(PLACES) / 60
