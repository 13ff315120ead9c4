"""How far along its scheduler's schedule a diffusers denoiser is called, whatever unit it is told the time in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klora.errors import KloraError

TRAIN_TIMESTEPS = 1000
_ROUNDINGS = 4
"""How many roundings may part what a pipeline computes from what is computed here."""


@dataclass
class Unit:
    """One way to tell a denoiser the time: `of` makes a noise level of it.

    `schedule` holds the levels of the scheduler's timesteps, in their order. A value may differ from its timestep by
    `eps`, times itself where that is `relative`. `span` is the level at which sampling begins.
    """

    schedule: list[float]
    of: Callable[[float], float]
    eps: float
    relative: bool
    span: float = 1.0
    last: float = float("inf")

    def nearest(self, value: float) -> float:
        """The level of the schedule that is nearest to a value's."""
        level = self.of(value)
        return min(self.schedule, key=lambda other: abs(other - level))

    def residual(self, value: float) -> float:
        """How far a value lies from the schedule, as a fraction of the span."""
        return abs(self.of(value) - self.nearest(value)) / self.span

    def fits(self, value: float) -> bool:
        """Whether rounding alone parts a value from the schedule."""
        return self.residual(value) * self.span <= self.eps * (abs(value) if self.relative else 1.0)

    def is_at(self, value: float, index: int) -> bool:
        """Whether a value is that of the timestep number `index`."""
        return self.nearest(value) == self.schedule[min(index, len(self.schedule) - 1)]

    def follows(self, value: float) -> bool:
        """Whether a value fits, and has no more noise than the one before."""
        return self.fits(value) and self.nearest(value) <= self.last

    def level(self, value: float) -> float:
        """The noise level of a value: that of the schedule where it fits."""
        self.last = self.nearest(value) if self.fits(value) else self.of(value)
        return self.last


class Schedule:
    """One pass over a scheduler's timesteps, in the unit that the denoiser is told the time in.

    That is the unit which fits the first call of the pass. Where several do, it is one in which the pass begins where
    the scheduler does: a flow's 1.0 is t/N at the beginning, and at the end of a schedule may be a timestep 1. Where
    that does not tell, as in the very middle, they agree on the level, and later calls tell them apart, since noise
    does not grow.
    """

    def __init__(self, scheduler: Any, timestep: Tensor, pipeline: str) -> None:
        """Take the `timestep` of the pass's first call; KloraError, naming `pipeline`, where it fits in no unit."""
        self.timesteps = scheduler.timesteps
        value = value_of(timestep)
        units = _units(scheduler, timestep.dtype)
        index = _index(scheduler)
        found = sorted(units, key=lambda unit: (not unit.is_at(value, index), unit.residual(value)))
        self._units = [unit for unit in found if unit.fits(value)]
        if not self._units:
            raise KloraError(
                f"{pipeline} calls its model with timestep {value:g}, which {type(scheduler).__name__} does not have in"
                " any known unit, so that how far sampling is cannot be told; use another scheduler or pipeline"
            )
        levels = self._units[0].schedule
        if 0 == self.timesteps[-1] < self.timesteps[0] <= 1:
            # Of Würstchen's fractions the last is where sampling ends; of whole numbers, 0 is a step.
            levels = levels[:-1]
        # Flow schedulers of older diffusers keep no count, and list no midpoints.
        self.steps = steps_of(levels, getattr(scheduler, "num_inference_steps", None))
        self._last = float("inf")

    def level(self, timestep: Tensor) -> float:
        """The noise level that the denoiser is called with."""
        value = value_of(timestep)
        if len(self._units) > 1:
            self._units = [unit for unit in self._units if unit.follows(value)] or self._units[:1]
        level, *_ = [unit.level(value) for unit in self._units]
        if self._last < level < self._last + self._units[0].span / TRAIN_TIMESTEPS:
            # Some schedulers round their timesteps, and not the midpoints between them.
            return self._last
        self._last = level
        return level


def steps_of(levels: list[float], count: int | None) -> list[float]:
    """The levels of a scheduler's steps, descending, of the `levels` of all calls, if it makes `count` steps.

    Second-order schedulers list midpoints too: between all steps, or as PNDM's Runge-Kutta start between the first.
    """
    distinct = sorted(set(levels), reverse=True)
    midpoints = len(distinct) - (count or len(distinct))
    if not 0 < midpoints < (count or 0):
        return distinct
    return distinct[: 2 * midpoints : 2] + distinct[2 * midpoints :]


def _index(scheduler: Any) -> int:
    """Which of its timesteps a scheduler is at; the first, unless a pipeline has told it of another."""
    found = (getattr(scheduler, name, None) for name in ("step_index", "begin_index"))
    return next((index for index in found if index is not None), 0)


def value_of(timestep: Tensor) -> float:
    """One value of a call's timesteps: the last, since frames that a video begins with are told to be done."""
    return float(timestep.flatten()[-1].item())


def _units(scheduler: Any, dtype: torch.dtype) -> Iterator[Unit]:
    """t, t/N and 1 − t/N for N training steps, rounded to `dtype` before or after, as pipelines do either."""
    timesteps, rounded = scheduler.timesteps, scheduler.timesteps.to(dtype)
    count = float(getattr(scheduler.config, "num_train_timesteps", None) or TRAIN_TIMESTEPS)
    if not dtype.is_floating_point:
        yield Unit(rounded.tolist(), float, 0.0, relative=True, span=count)
        return
    eps = _ROUNDINGS * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    yield Unit(rounded.tolist(), float, eps, relative=True, span=count)
    for fractions in (rounded / count, (timesteps / count).to(dtype)):
        yield Unit(fractions.tolist(), float, eps, relative=True)
    for times in (1 - rounded / count, (1 - timesteps / count).to(dtype)):
        yield Unit([1 - time for time in times.tolist()], lambda time: 1 - time, eps, relative=False)
