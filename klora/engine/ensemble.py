"""Prediction by several forwards of the denoiser, each with other LoRAs active: LoRA Composite and CMLoRA.

Everything is on the instance: the host calls `begin` before a forward of the denoiser; `finish` is its forward hook.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from klora.engine.session import Session
from klora.fusion.policies.base import BOTH, Active, Forward

MAX_PREDICTIONS = 8
"""How many predictions are kept at most: one per LoRA and conditioning is needed."""


class Prediction(NamedTuple):
    """A prediction that may be used again: what it was made for, in which sampling pass, at which step."""

    condition: Any
    active: Active
    sampling: Any
    step: int
    output: Any


class Ensemble:
    """The weighted mean of the forwards that a session's policy asks for.

    `condition` gives, of a forward's arguments, the conditioning; calls with the same object predict the same thing.
    """

    def __init__(self, session: Session, condition: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> None:
        self.session = session
        self._condition = condition
        self._kept: list[Prediction] = []
        self._busy = False
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    @property
    def _forwards(self) -> tuple[Forward, ...]:
        return self.session.plan.predictions(self.session.moment.tau)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Have the forward with these arguments, which is about to run, be the first of those asked for."""
        if not self._busy and (forwards := self._forwards):
            # A denoiser may empty the lists that it is called with (T2I-Adapter's features).
            self._arguments = fresh((args, kwargs))
            self.session.set_active(forwards[0].active)

    def finish(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Make the other forwards, or take them from an earlier step, and give the mean in the output's own form."""
        if self._busy or not self._forwards:
            return None
        self._busy = True
        args, kwargs = self._arguments
        try:
            first, *others = self._forwards
            outputs = [output, *(self._predict(forward, denoiser, args, kwargs) for forward in others)]
            return weighted_mean(outputs, [first.weight, *(forward.weight for forward in others)])
        finally:
            self._busy, self._arguments = False, ((), {})
            self.session.set_active(BOTH)

    def _predict(self, forward: Forward, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        condition = self._condition(args, kwargs)
        session, step = self.session, self.session.moment.step
        for kept in self._kept:
            same = kept.condition is condition and kept.active == forward.active and kept.sampling is session.sampling
            if same and 0 <= step - kept.step < forward.reuse:
                return kept.output
        session.set_active(forward.active)
        # Hooks of others on the denoiser see one forward: pre-hooks have run, hooks will get the mean.
        args, kwargs = fresh((args, kwargs))
        output = denoiser.forward(*args, **kwargs)
        if forward.reuse > 1:
            self._kept = [
                kept for kept in self._kept if kept.condition is not condition or kept.active != forward.active
            ][-MAX_PREDICTIONS + 1 :]
            self._kept.append(Prediction(condition, forward.active, session.sampling, step, output))
        return output


def fresh(value: Any) -> Any:
    """The same with lists and dictionaries of its own, of the same contents."""
    if type(value) is list or type(value) is tuple:
        return type(value)(fresh(item) for item in value)
    if type(value) is dict:
        return {key: fresh(item) for key, item in value.items()}
    return value


def weighted_mean(outputs: Sequence[Any], weights: Sequence[float]) -> Any:
    """Σ w·ε of tensors, of lists of them, or of what tuples or model outputs begin with, in the form of the first."""
    first = outputs[0]
    if isinstance(first, Tensor):
        mean = first * weights[0]
        for output, weight in zip(outputs[1:], weights[1:], strict=True):
            mean = mean.add_(output, alpha=weight)
        return mean
    if isinstance(first, list):
        return [weighted_mean(parts, weights) for parts in zip(*outputs, strict=True)]
    if isinstance(first, tuple):
        return (weighted_mean([output[0] for output in outputs], weights), *first[1:])
    # A model output: a dictionary with a class of its own.
    name = next(iter(first.keys()))
    return type(first)(**{**first, name: weighted_mean([output[name] for output in outputs], weights)})
