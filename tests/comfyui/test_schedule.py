"""Which schedule a sampler's noise levels are from."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klora.hosts.comfyui.schedule import whole_schedule
from tests.comfyui import fake_comfyui
from tests.comfyui.fake_comfyui import Sampling, sigmas_of

SAMPLING = Sampling()


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        yield fake_comfyui.install(patch, tmp_path_factory.mktemp("loras"))


@given(
    scheduler=st.sampled_from(["karras", "exponential"]),
    steps=st.integers(6, 60),
    part=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(deadline=None, max_examples=60)
def test_any_part_of_four_levels_or_more_tells_its_schedule(
    scheduler: str, steps: int, part: tuple[float, float]
) -> None:
    whole = sigmas_of(steps, scheduler)
    start = int(min(part) * (len(whole) - 4))
    stop = start + 4 + int(max(part) * (len(whole) - 4 - start))
    found = whole_schedule(SAMPLING, whole[start:stop])
    assert found.known
    assert found.levels == pytest.approx(whole[:-1], rel=1e-3)


def test_a_sampler_that_leaves_out_the_last_level_but_one_is_known_too() -> None:
    whole = sigmas_of(21)
    discarding = [*whole[:-2], whole[-1]]
    found = whole_schedule(SAMPLING, discarding[8:])
    assert found.known
    assert found.levels == pytest.approx(discarding[:-1], rel=1e-3)


def test_a_schedule_from_the_highest_level_to_0_is_taken_as_it_is() -> None:
    levels = [14.6, 6.5, 3.9, 2.2, 0.7, 0.0]
    assert whole_schedule(SAMPLING, levels) == (levels[:-1], True)


def test_what_is_missing_of_any_other_is_as_long_as_its_part_of_the_way() -> None:
    # Evenly spaced steps, but from nowhere that a scheduler would begin at.
    percents = [0.41, 0.5, 0.61, 0.7, 0.81]
    levels = [SAMPLING.percent_to_sigma(percent) for percent in percents]
    found = whole_schedule(SAMPLING, levels)
    assert not found.known
    assert len(found.levels) == 4 + 4 + 2
    assert found.levels == sorted(found.levels, reverse=True)
    assert found.levels[4:8] == pytest.approx(levels[:-1])


def test_one_step_from_the_middle_tells_no_schedule_and_still_gives_one() -> None:
    found = whole_schedule(SAMPLING, [2.0, 0.0])
    assert not found.known
    assert 2.0 in found.levels
