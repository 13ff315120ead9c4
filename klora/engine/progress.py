"""From a noise level to τ, the position in the sampling schedule.

A noise level is whatever the sampler passes to the model and decreases while sampling: σ, a timestep, or the
time of a flow. Calls at one level agree by construction, however many of them a sampler makes.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A schedule of N distinct noise levels, `points` in descending order, one per step.

    The level 0 that a schedule of σ ends with is no step; a timestep 0 at which the last step is made is one.
    """

    points: tuple[float, ...]

    @classmethod
    def of(cls, levels: Iterable[float]) -> Progress:
        """Make it from the levels of a sampler's steps, leaving out repeats; ValueError where there are none."""
        points = sorted({float(level) for level in levels if math.isfinite(level)}, reverse=True)
        if not points:
            raise ValueError("a schedule without noise levels has no progress")
        return cls(tuple(points))

    @property
    def steps(self) -> int:
        """N, the number of steps."""
        return len(self.points)

    def tau(self, level: float) -> float:
        """τ in [0, 1]: i/N at point i, between points linear in log(level), from the last point to 0 linear."""
        if level >= self.points[0]:
            return 0.0
        # The index of the first point at or below `level`.
        index = bisect.bisect_left(self.points, -level, key=lambda point: -point)
        if index < self.steps and self.points[index] == level:
            return index / self.steps
        above = self.points[index - 1]
        below = self.points[index] if index < self.steps else min(0.0, level)
        return (index - 1 + _fraction(above, level, below)) / self.steps


class SamplingPass:
    """One pass of a sampler over a schedule, or over the end of it (img2img, hires).

    With `relative`, τ is 0 at the first level met and 1 at the end, however late in the schedule the pass begins.
    """

    def __init__(self, levels: Iterable[float], relative: bool = False) -> None:
        """Take the noise levels of the whole schedule; ValueError where there are none."""
        self.progress = Progress.of(levels)
        self.relative = relative
        self._start: float | None = None

    def tau(self, level: float) -> float:
        """τ in [0, 1] at a noise level."""
        tau = self.progress.tau(level)
        if self._start is None:
            self._start = tau if self.relative and tau < 1 else 0.0
        # A sampler may go back to a higher noise than it began with; that is the beginning still.
        return max(0.0, tau - self._start) / (1 - self._start)


def _fraction(above: float, level: float, below: float) -> float:
    """How much of the way from `above` down to `below` is done at `level`."""
    if below > 0:
        return math.log(above / level) / math.log(above / below)
    return (above - level) / (above - below)
