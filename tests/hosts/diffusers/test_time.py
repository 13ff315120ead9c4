"""How far along its schedule a denoiser is called, whatever it is told: units, midpoints, pipelines that share it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import klora
from klora.errors import KloraError
from klora.hosts.diffusers.time import Schedule, steps_of
from tests.support.lora_files import write_lora
from tests.support.pipelines import run, scheduler, sd_pipeline

ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def schedule(timesteps: list[float], first: float, count: int | None = None, **values: Any) -> Schedule:
    fake = SimpleNamespace(
        **values,
        timesteps=torch.tensor(timesteps),
        config=SimpleNamespace(num_train_timesteps=1000),
        num_inference_steps=count or len(timesteps),
    )
    return Schedule(fake, torch.tensor([first]), "a pipeline")


def levels(timesteps: list[float], told: list[float]) -> list[float]:
    found = schedule(timesteps, told[0])
    return [round(found.level(torch.tensor([value])), 6) for value in told]


@pytest.mark.parametrize("timesteps", [[1000.0, 750.0, 500.0, 1.0], [1000.0, 998.0, 600.0, 250.0, 1.0], [1000.0, 1.0]])
def test_a_flow_that_ends_at_timestep_1_and_is_told_in_fractions_begins_at_the_beginning(
    timesteps: list[float],
) -> None:
    told = [value / 1000 for value in timesteps]
    assert levels(timesteps, told) == pytest.approx(told)
    assert levels(timesteps, timesteps) == timesteps


@pytest.mark.parametrize("told", [[0.5, 0.3, 0.1], [0.5, 0.7, 0.9]])
def test_a_pass_that_begins_in_the_very_middle_is_told_apart_by_what_comes_next(told: list[float]) -> None:
    assert levels([900.0, 700.0, 500.0, 300.0, 100.0], told) == pytest.approx([0.5, 0.3, 0.1])


@pytest.mark.parametrize("at", [{"begin_index": 3}, {"begin_index": 0, "step_index": 3}])
def test_a_pass_that_begins_late_is_in_the_unit_that_its_scheduler_is_at(at: dict[str, int | None]) -> None:
    # Of 1, the last timestep or the first fraction; of 0.6, the second time of a flow or what is left of the fourth.
    assert schedule([1000.0, 750.0, 500.0, 1.0], 1.0, **at).level(torch.tensor([1.0])) == 1.0
    timesteps = [1000.0, 600.0, 500.0, 400.0]
    assert schedule(timesteps, 0.6, **at).level(torch.tensor([0.6])) == pytest.approx(0.4)
    assert schedule(timesteps, 0.6, begin_index=1, step_index=None).level(torch.tensor([0.6])) == pytest.approx(0.6)


def test_a_time_that_fits_no_unit_is_an_error_that_names_pipeline_and_scheduler() -> None:
    with pytest.raises(KloraError, match="a pipeline calls its model with timestep 42, which SimpleNamespace does not"):
        schedule([900.0, 500.0], 42.0)


@pytest.mark.parametrize(
    ("calls", "count", "expected"),
    [
        ([5, 4, 3], 3, [5, 4, 3]),
        ([5, 4, 4, 3, 3], 3, [5, 4, 3]),
        ([5, 4.5, 4, 3.5, 3], 3, [5, 4, 3]),
        # PNDM, six steps: three of Runge and Kutta, which look at each level and midpoint twice, then three of PLMS.
        ([831, 748, 748, 665, 665, 582, 582, 499, 499, 416, 416, 333, 333, 167, 1], 6, [831, 665, 499, 333, 167, 1]),
        ([5, 4, 3], None, [5, 4, 3]),
        ([9, 8, 7, 6, 5, 4, 3], 2, [9, 8, 7, 6, 5, 4, 3]),
    ],
)
def test_midpoints_are_no_steps(calls: list[float], count: int | None, expected: list[float]) -> None:
    assert steps_of(calls, count) == expected


def test_of_fractions_that_end_at_0_the_last_is_no_step_and_of_whole_numbers_it_is_one() -> None:
    assert schedule([1.0, 0.75, 0.5, 0.25, 0.0], 1.0).steps == [1.0, 0.75, 0.5, 0.25]
    assert schedule([900.0, 600.0, 300.0, 0.0], 900.0).steps == [900.0, 600.0, 300.0, 0.0]
    assert schedule([0.0], 0.0).steps == [0.0]


def test_a_midpoint_below_the_rounded_timestep_after_it_does_not_lead_back() -> None:
    found = schedule([999.0, 600.0, 3.4, 4.0, 1.0], 999.0)
    assert [found.level(torch.tensor([t])) for t in (999.0, 600.0, 3.4, 4.0, 1.0)] == [
        999.0,
        600.0,
        pytest.approx(3.4),
        pytest.approx(3.4),
        1.0,
    ]
    # Sampling that goes back on purpose does.
    assert found.level(torch.tensor([600.0])) == 600.0


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return sd_pipeline(tmp_path / "tokenizer", levels=2)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    first, second = (write_lora(tmp_path / f"{i}.safetensors", {ATTENTION: (16, 16)}, "peft", seed=i) for i in (1, 2))
    return first, second


def test_the_runge_kutta_start_of_pndm_counts_six_steps_as_six(pipe: Any, files: tuple[Path, Path]) -> None:
    pipe.scheduler = scheduler("PNDMScheduler", skip_prk_steps=False)
    with klora.fuse(pipe, *files) as session:
        seen = followed(session, lambda: run(pipe, num_inference_steps=6))
    assert session.plan.steps == 6
    assert sorted({round(tau * 6, 6) for tau in seen if (tau * 6) % 1 < 1e-9}) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "HeunDiscreteScheduler"])
def test_no_second_order_scheduler_leads_back(pipe: Any, files: tuple[Path, Path], name: str) -> None:
    pipe.scheduler = scheduler(name, use_karras_sigmas=True)
    with klora.fuse(pipe, *files) as session:
        seen = followed(session, lambda: run(pipe, num_inference_steps=12))
    assert seen == sorted(seen)
    assert session.plan.steps == 12


def followed(session: Any, sample: Any) -> list[float]:
    """The τ that a session is told while something is sampled."""
    seen: list[float] = []
    told = session.at_level
    session.at_level = lambda level: (told(level), seen.append(session.tau))
    sample()
    del session.at_level
    return seen


def test_a_second_pipeline_that_shares_the_denoiser_is_followed_by_its_own_scheduler(
    pipe: Any, files: tuple[Path, Path]
) -> None:
    import diffusers

    parts = {**pipe.components, "scheduler": scheduler("EulerDiscreteScheduler"), "requires_safety_checker": False}
    other = diffusers.StableDiffusionImg2ImgPipeline(**parts)
    other.set_progress_bar_config(disable=True)
    with klora.fuse(pipe, *files) as session:
        first = followed(session, lambda: run(pipe, num_inference_steps=4))
        options = {"image": torch.zeros(1, 3, 32, 32), "strength": 0.5, "num_inference_steps": 10}
        second = followed(session, lambda: run(other, **options))
        again = followed(session, lambda: run(pipe, num_inference_steps=4))
    assert first == again == pytest.approx([0, 0.25, 0.5, 0.75])
    assert second == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])
