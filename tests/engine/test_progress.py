"""τ is a function of the noise level alone."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klora.engine.progress import Progress, SamplingPass

schedules = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=60, unique=True)


@given(schedules)
def test_a_schedule_point_is_at_its_index(levels: list[float]) -> None:
    ordered = sorted(levels, reverse=True)
    progress = Progress.of(levels)
    assert progress.steps == len(levels)
    assert [progress.tau(level) for level in ordered] == [i / len(levels) for i in range(len(levels))]
    assert progress.tau(0.0) == 1.0


@given(schedules, st.floats(0, 2e3), st.floats(0, 2e3))
def test_tau_grows_as_the_noise_falls_and_stays_in_the_unit_interval(
    levels: list[float], one: float, two: float
) -> None:
    progress = Progress.of(levels)
    assert 0.0 <= progress.tau(max(one, two)) <= progress.tau(min(one, two)) <= 1.0


def test_between_points_tau_is_linear_in_log_sigma_and_in_the_last_interval_linear_in_sigma() -> None:
    progress = Progress.of([16.0, 4.0, 1.0])
    assert progress.tau(8.0) == pytest.approx(0.5 / 3)
    assert progress.tau(2.0) == pytest.approx(1.5 / 3)
    assert progress.tau(0.25) == pytest.approx(2.75 / 3)


def test_repeats_are_one_point() -> None:
    assert Progress.of([900, 900, 500, 500, 100]) == Progress.of([900, 500, 100])


def test_a_step_made_at_timestep_zero_is_a_step() -> None:
    progress = Progress.of([999, 500, 0])
    assert [progress.tau(t) for t in (999, 500, 250, 0)] == pytest.approx([0, 1 / 3, 1 / 2, 2 / 3])


def test_levels_above_the_schedule_are_its_beginning() -> None:
    assert Progress.of([10.0, 1.0]).tau(100.0) == 0.0


def test_an_empty_schedule_is_an_error() -> None:
    with pytest.raises(ValueError, match="noise levels"):
        Progress.of([math.nan])


@pytest.mark.parametrize("steps", [20, 30, 50])
def test_any_number_of_steps_follows_the_same_curve(steps: int) -> None:
    # The same noise level in a finer or coarser Karras-like schedule is at nearly the same τ.
    ramp = [i / (steps - 1) for i in range(steps)]
    progress = Progress.of([(14.6 ** (1 / 7) + t * (0.03 ** (1 / 7) - 14.6 ** (1 / 7))) ** 7 for t in ramp])
    reference = {10.0: 0.10, 1.0: 0.513, 0.1: 0.868}
    for sigma, tau in reference.items():
        assert progress.tau(sigma) == pytest.approx(tau, abs=0.05)


def test_a_relative_pass_runs_from_0_to_1_wherever_it_begins() -> None:
    sampling = SamplingPass([8.0, 4.0, 2.0, 1.0], relative=True)
    assert [sampling.tau(level) for level in (4.0, 2.0, 1.0, 0.0)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_a_relative_pass_that_goes_back_behind_its_beginning_is_at_its_beginning() -> None:
    sampling = SamplingPass([8.0, 4.0, 2.0, 1.0], relative=True)
    assert sampling.tau(2.0) == 0.0
    assert sampling.tau(8.0) == 0.0
    assert sampling.tau(1.0) == pytest.approx(0.5)


def test_a_relative_pass_that_begins_at_the_end_stays_there() -> None:
    sampling = SamplingPass([8.0, 4.0], relative=True)
    assert sampling.tau(0.0) == 1.0
    assert sampling.tau(4.0) == 0.5


def test_an_absolute_pass_begins_where_its_noise_lies() -> None:
    sampling = SamplingPass([8.0, 4.0, 2.0, 1.0])
    assert [sampling.tau(level) for level in (2.0, 8.0, 1.0)] == [0.5, 0.0, 0.75]


def test_levels_below_the_last_point_of_timesteps_that_end_at_0_are_the_end() -> None:
    progress = Progress.of([4.0, 2.0])
    assert progress.tau(0.5) == pytest.approx(0.5 + 0.5 * 0.75)
    assert progress.tau(1.0) == pytest.approx(0.75)
    negative = Progress.of([3.0, 1.0, -1.0])
    assert negative.tau(0.0) == pytest.approx(1.5 / 3)
    assert negative.tau(-1.0) == pytest.approx(2 / 3)
