"""What a user of a session sees of it: the plan, where sampling is, what has acted and what found no place."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping

from klora.engine.bypass import Part
from klora.engine.dynamic import Chooser
from klora.engine.parameters import HeldParameters
from klora.fusion.plan import FusionPlan
from klora.fusion.policies.base import Moment
from klora.lora.file import LoraFile
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
    _parts: Mapping[str, Part]
    _chooser: Chooser | None
    _parameters: HeldParameters
    _sites: Collection[str]
    _text_sites: Collection[str]

    @property
    def missing(self) -> tuple[str, ...]:
        """The modules of either file that the model does not have."""
        files = (self.pair.subject, self.pair.style)
        return tuple(dict.fromkeys(name for file in files for name in file.modules if name not in self._parts))

    @property
    def left_out(self) -> list[str]:
        """What of each file found no place in the model, one line a file."""
        return [text for lora in self.pair.loras if (text := self._left_out(lora))]

    def _left_out(self, lora: LoraFile) -> str:
        modules = [name for name in lora.modules if name not in self._sites]
        # Where none is known, the host's own LoRA code applies them, or there is no text encoder to encode with.
        text = [name for name in lora.text_encoder if self._text_sites and name not in self._text_sites]
        known = self.pair.model.parameters if self.pair.model else {}
        others = [delta.key for path, delta in lora.parameters.items() if path not in known]
        biases = [name for name in self._parameters.absent if (delta := lora.modules.get(name)) and delta.bias]
        count = len(lora.modules) + len(lora.text_encoder)
        absent = [*modules, *text]
        told = [f"{len(absent)} of its {count} modules (such as {absent[0]})"] if absent else []
        told += [f"{len(others)} changes of other parameters (such as {others[0]})"] if others else []
        told += [f"{len(biases)} biases (such as that of {biases[0]})"] if biases else []
        return f"{lora.label}: {', '.join(told)} found no place in the model and do nothing" if told else ""

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
