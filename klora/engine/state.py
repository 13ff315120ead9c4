"""What a user of a session sees of it: the plan, where sampling is, what has acted and what found no place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from klora.engine.bypass import Part
from klora.engine.dynamic import Chooser
from klora.fusion.plan import FusionPlan
from klora.fusion.policies.base import Moment
from klora.pair import Pair


class SessionState:
    """What can be read of a session, at any time; nothing here changes anything."""

    pair: Pair
    """The two sides, under the names of the model."""
    plan: FusionPlan
    """Who acts in which module at which step; its steps are the sampler's once sampling has begun."""
    tau: float | None
    """How far sampling is, from 0 to 1; None between passes."""
    acted: bool
    """False once it is known that nothing has acted."""
    left_out: list[str]
    """What of each file found no place in the model, one line a file."""
    _parts: Mapping[str, Part]
    _chooser: Chooser | None

    @property
    def missing(self) -> tuple[str, ...]:
        """The modules of either file that the model does not have."""
        files = (self.pair.subject, self.pair.style)
        return tuple(dict.fromkeys(name for file in files for name in file.modules if name not in self._parts))

    @property
    def decisions(self) -> dict[str, list[tuple[float, str]]]:
        """What was decided while sampling: per measured module (τ, letter), in order; empty for other policies."""
        return self._chooser.decisions if self._chooser else {}

    @property
    def observed(self) -> FusionPlan:
        """The plan with what was decided while sampling in the place of what could not be planned."""
        if not self.decisions:
            return self.plan
        record = {name: selection_of(found, self.plan.steps) for name, found in self.decisions.items()}
        return dataclasses.replace(self.plan, record=record)


def selection_of(decisions: Iterable[tuple[float, str]], steps: int) -> str:
    """Write decisions (τ, letter) as one letter per step: the last one at or before it, at first the first one."""
    letters = ""
    for tau, letter in sorted(decisions):
        step = Moment(tau, steps, 0.0).step
        # Of calls at one step, the last decides; before the first call, what it found is taken to hold.
        letters = (letters[:step] + (letters[-1] if letters else letter) * (step - len(letters)) + letter)[:steps]
    return letters + letters[-1] * (steps - len(letters))
