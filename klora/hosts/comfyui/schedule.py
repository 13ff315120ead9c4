"""The whole schedule that a sampler's noise levels are from, where it samples but a part of it.

A sampler is given the levels of its own steps: with a denoise below 1, or of a split schedule, these are the end, the
beginning or the middle of a longer one. Its scheduler is not named; the levels tell which of ComfyUI's it was, since
the same levels in the same order come of one number of steps alone.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

MOST = 16
"""How many times as long as its part a schedule is looked for: as with a denoise of 0.06."""
_FEWEST = 4
_NEAR = 1e-4


class Schedule(NamedTuple):
    """The noise levels of every step of a whole schedule, in descending order; `known`: not in part estimated."""

    levels: list[float]
    known: bool


def whole_schedule(sampling: Any, sigmas: Sequence[float]) -> Schedule:
    """The schedule that `sigmas`, the noise levels of a sampler's steps and of their end, are from.

    `sampling` is the model's own account of its noise levels (ComfyUI's `model_sampling`). Where the levels are a part
    of no schedule that ComfyUI has, the steps before and after are taken to be as many as their part of the way calls
    for, evenly spaced in ComfyUI's percent.
    """
    mine = [float(sigma) for sigma in sigmas]
    begin, end = _percent(sampling, mine[0]), _percent(sampling, mine[-1]) if mine[-1] > 0 else 1.0
    steps = len(mine) - 1
    near = 0.5 * (end - begin) / max(steps, 1)
    whole = mine[0] >= _level(sampling, 0.0) * (1 - _NEAR) and end == 1.0
    found = mine[:-1] if whole else _found(sampling, mine)
    if found is not None:
        return Schedule(found, known=True)
    if begin <= near and end == 1.0:
        # A schedule of its own, that begins a little below the model's highest level.
        return Schedule(mine[:-1], known=True)
    # The last level is that of a step of the rest of the schedule, if any follows.
    per_step = (end - begin) / max(steps, 1) or 1.0
    before, after = round(begin / per_step), round((1.0 - end) / per_step)
    return Schedule(
        [
            *(_level(sampling, begin * i / before) for i in range(before)),
            *mine[:-1],
            *(_level(sampling, end + (1.0 - end) * i / after) for i in range(after)),
        ],
        known=begin <= near and not after,
    )


def _found(sampling: Any, mine: Sequence[float]) -> list[float] | None:
    """The levels of a schedule of ComfyUI's that has all of `mine` one after another; None where there is none."""
    if len(mine) < _FEWEST:
        return None
    samplers = importlib.import_module("comfy.samplers")
    for scheduler in samplers.SCHEDULER_NAMES:
        for made in _candidates(partial(_made, samplers, sampling, scheduler), mine):
            # Some samplers go from the last step but one to the end.
            for sigmas in (made, made[:-2] + made[-1:]):
                if _contains(sigmas, mine):
                    return sigmas[:-1]
    return None


def _made(samplers: Any, sampling: Any, scheduler: str, steps: int) -> list[float]:
    try:
        sigmas: list[float] = samplers.calculate_sigmas(sampling, scheduler, steps).tolist()
    except Exception:  # Schedulers of other extensions are among them, and some cannot do every number of steps.
        return []
    return sigmas


def _candidates(made: Callable[[int], list[float]], mine: Sequence[float]) -> Iterator[list[float]]:
    """The schedules of a scheduler that have about as many levels in the range of `mine` as there are."""
    top, bottom = mine[0] * (1 + _NEAR), mine[-1] * (1 - _NEAR)

    def count(sigmas: list[float]) -> int:
        return sum(bottom <= sigma <= top for sigma in sigmas)

    # With the number of steps that is sought or more, there are as many levels in the range, or one fewer.
    low, high = 0, len(mine) - 1
    while count(made(high)) < len(mine) - 1:
        if high > MOST * len(mine):
            return
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if count(made(middle)) >= len(mine) - 1 else (middle, high)
    for steps in range(high, high + 2 * high // (len(mine) - 3) + 2):
        sigmas = made(steps)
        if count(sigmas) > len(mine) + 1:
            return
        yield sigmas


def _contains(sigmas: Sequence[float], mine: Sequence[float]) -> bool:
    start = next((i for i, sigma in enumerate(sigmas) if _same(sigma, mine[0])), len(sigmas))
    part = sigmas[start : start + len(mine)]
    return len(part) == len(mine) and all(map(_same, part, mine))


def _same(sigma: float, other: float) -> bool:
    return math.isclose(sigma, other, rel_tol=_NEAR)


def _level(sampling: Any, percent: float) -> float:
    # At 0 ComfyUI gives a number beyond every level.
    return float(sampling.percent_to_sigma(percent)) if percent > 0 else float(sampling.sigma_max)


def _percent(sampling: Any, sigma: float) -> float:
    """How much of the way a noise level has behind it, in ComfyUI's percent of sampling, 0 to 1."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _level(sampling, middle) > sigma else (low, middle)
    return low if low > 1e-6 else 0.0
