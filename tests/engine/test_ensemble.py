"""Several forwards averaged: which LoRAs are active in each, what is reused for how long, and the form of the mean."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from klora.engine.ensemble import MAX_PREDICTIONS, Ensemble, weighted_mean
from klora.fusion.policies.base import BOTH, STYLE, SUBJECT, Active, Forward, Moment


class Denoiser(nn.Module):
    """Says which LoRAs were active: 1 for the subject, 10 for the style."""

    def __init__(self, session: FakeSession) -> None:
        super().__init__()
        self.session, self.calls = session, []

    def forward(self, x: Tensor, condition: object = None) -> Tensor:
        self.calls.append(self.session.active)
        return x + self.session.active.subject + 10 * self.session.active.style


class FakeSession:
    """What an ensemble needs of a session."""

    def __init__(self, *forwards: Forward, steps: int = 10) -> None:
        self.forwards, self.steps, self.step = forwards, steps, 0
        self.active, self.sampling = BOTH, object()
        self.plan = SimpleNamespace(predictions=lambda tau: self.forwards)

    @property
    def moment(self) -> Moment:
        return Moment(self.step / self.steps, self.steps, 0.0)

    def set_active(self, active: Active) -> None:
        self.active = active


def made(*forwards: Forward) -> tuple[FakeSession, Denoiser, Ensemble]:
    session = FakeSession(*forwards)
    denoiser = Denoiser(session)
    ensemble = Ensemble(session, lambda args, kwargs: kwargs.get("condition"))  # type: ignore[arg-type]
    denoiser.register_forward_pre_hook(lambda _, args, kwargs: ensemble.begin(args, kwargs), with_kwargs=True)
    denoiser.register_forward_hook(ensemble.finish, with_kwargs=True)
    return session, denoiser, ensemble


def test_each_forward_has_its_loras_and_the_mean_its_weights() -> None:
    session, denoiser, _ = made(Forward(SUBJECT, 0.25), Forward(STYLE, 0.75))
    assert denoiser(torch.zeros(2)).tolist() == [0.25 * 1 + 0.75 * 10] * 2
    assert denoiser.calls == [SUBJECT, STYLE]
    assert session.active == BOTH


@given(st.integers(1, 6), st.integers(1, 24))
def test_a_prediction_is_kept_for_as_many_steps_as_the_policy_says_and_not_one_more(reuse: int, steps: int) -> None:
    session, denoiser, _ = made(Forward(SUBJECT, 0.5), Forward(STYLE, 0.5, reuse))
    condition = object()
    made_at = []
    for step in range(steps):
        session.step, before = step, len(denoiser.calls)
        denoiser(torch.zeros(1), condition=condition)
        if len(denoiser.calls) - before == 2:
            made_at.append(step)
    assert made_at == list(range(0, steps, reuse))


def test_what_is_kept_is_of_one_condition_one_lora_and_one_pass() -> None:
    session, denoiser, _ = made(Forward(SUBJECT, 0.5), Forward(STYLE, 0.5, 5))
    one, other = object(), object()

    def forwards(condition: object) -> int:
        before = len(denoiser.calls)
        denoiser(torch.zeros(1), condition=condition)
        return len(denoiser.calls) - before

    assert [forwards(one), forwards(one), forwards(other), forwards(other), forwards(one)] == [2, 1, 2, 1, 1]
    session.forwards = (Forward(STYLE, 0.5), Forward(SUBJECT, 0.5, 5))
    assert forwards(one) == 2
    session.forwards = (Forward(SUBJECT, 0.5), Forward(STYLE, 0.5, 5))
    assert forwards(one) == 1
    session.sampling = object()
    assert forwards(one) == 2


def test_a_sampler_that_goes_back_gets_a_new_prediction() -> None:
    session, denoiser, _ = made(Forward(SUBJECT, 0.5), Forward(STYLE, 0.5, 5))
    condition = object()
    session.step = 3
    denoiser(torch.zeros(1), condition=condition)
    session.step = 2
    denoiser(torch.zeros(1), condition=condition)
    assert len(denoiser.calls) == 4


def test_the_number_kept_is_bounded() -> None:
    _, denoiser, ensemble = made(Forward(SUBJECT, 0.5), Forward(STYLE, 0.5, 5))
    for _ in range(3 * MAX_PREDICTIONS):
        denoiser(torch.zeros(1), condition=object())
    assert len(ensemble._kept) == MAX_PREDICTIONS


def test_a_fault_in_a_later_forward_leaves_both_active_and_the_next_call_whole() -> None:
    session, denoiser, _ = made(Forward(SUBJECT, 0.5), Forward(STYLE, 0.5))
    original = denoiser.forward

    def fails(x: Tensor, condition: object = None) -> Tensor:
        if session.active == STYLE:
            raise RuntimeError("a fault")
        return original(x, condition)

    denoiser.forward = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="a fault"):
        denoiser(torch.zeros(1))
    assert session.active == BOTH
    del denoiser.forward
    assert denoiser(torch.zeros(1)).item() == 5.5


@dataclass
class Output(OrderedDict):
    """A model output, as transformers and diffusers have them: a dictionary with a class."""

    sample: Any = None
    extra: Any = None

    def __post_init__(self) -> None:
        super().__init__(sample=self.sample, extra=self.extra)

    def __hash__(self) -> int:
        return id(self)


def test_the_mean_has_the_form_of_the_first_output() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    assert weighted_mean([a, b], [0.5, 0.5]).tolist() == [2.0, 4.0]
    assert a.tolist() == [1.0, 2.0]
    mean = weighted_mean([(a, "rest"), (b, "other")], [0.75, 0.25])
    assert (mean[0].tolist(), mean[1:]) == ([1.5, 3.0], ("rest",))
    lists = weighted_mean([[a, b], [b, a]], [0.5, 2.0])
    assert [part.tolist() for part in lists] == [[6.5, 13.0], [3.5, 7.0]]
    output = weighted_mean([Output(a, "rest"), Output(b, "other")], [0.5, 0.5])
    assert isinstance(output, Output)
    assert (output.sample.tolist(), output.extra) == ([2.0, 4.0], "rest")


def test_the_forwards_that_it_makes_itself_are_not_averaged_again() -> None:
    session, denoiser, ensemble = made(Forward(SUBJECT, 0.5), Forward(STYLE, 0.5))
    seen: list[Any] = []
    inner = nn.Linear(1, 1)
    inner.register_forward_pre_hook(lambda _, args: ensemble.begin(args, {}))
    inner.register_forward_hook(lambda module, args, out: seen.append(ensemble.finish(module, args, {}, out)))
    original = denoiser.forward

    def forward(x: Tensor, condition: object = None) -> Tensor:
        if session.active == STYLE:
            inner(torch.zeros(1))
        return original(x, condition)

    denoiser.forward = forward  # type: ignore[method-assign]
    assert denoiser(torch.zeros(1)).item() == 5.5
    assert seen == [None]
    assert denoiser.calls == [SUBJECT, STYLE]


def test_a_condition_may_come_by_position_and_reaches_every_forward() -> None:
    session = FakeSession(Forward(SUBJECT, 0.5), Forward(STYLE, 0.5, 3))
    denoiser = Denoiser(session)
    ensemble = Ensemble(session, lambda args, kwargs: args[1] if len(args) > 1 else kwargs["condition"])  # type: ignore[arg-type]
    denoiser.register_forward_pre_hook(lambda _, args, kwargs: ensemble.begin(args, kwargs), with_kwargs=True)
    denoiser.register_forward_hook(ensemble.finish, with_kwargs=True)
    seen: list[Any] = []
    original = denoiser.forward

    def forward(x: Tensor, condition: object = None) -> Tensor:
        seen.append(condition)
        return original(x, condition)

    denoiser.forward = forward  # type: ignore[method-assign]
    one, other = object(), object()
    denoiser(torch.zeros(1), one)
    denoiser(torch.zeros(1), one)
    denoiser(torch.zeros(1), condition=other)
    assert seen == [one, one, one, other, other]


def test_what_is_not_to_be_reused_is_not_kept() -> None:
    _, denoiser, ensemble = made(Forward(SUBJECT, 0.5), Forward(STYLE, 0.5))
    denoiser(torch.zeros(1), condition=object())
    assert ensemble._kept == []


def test_a_mean_has_as_many_weights_as_outputs() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        weighted_mean([torch.zeros(1), torch.zeros(1)], [1.0])
    with pytest.raises(ValueError, match="zip"):
        weighted_mean([[torch.zeros(1)], [torch.zeros(1), torch.zeros(1)]], [0.5, 0.5])


def test_lists_that_a_forward_empties_are_whole_in_the_next_one() -> None:
    session = FakeSession(Forward(SUBJECT, 0.5), Forward(STYLE, 0.25), Forward(BOTH, 0.25))
    seen: list[list[float]] = []

    class Emptying(nn.Module):
        def forward(self, x: Tensor, features: list[Tensor], more: dict[str, list[Tensor]]) -> Tensor:
            seen.append([float(features.pop(0)), float(more["deep"].pop())])
            return x

    denoiser = Emptying()
    ensemble = Ensemble(session, lambda args, kwargs: None)  # type: ignore[arg-type]
    denoiser.register_forward_pre_hook(lambda _, args, kwargs: ensemble.begin(args, kwargs), with_kwargs=True)
    denoiser.register_forward_hook(ensemble.finish, with_kwargs=True)
    denoiser(torch.zeros(1), [torch.tensor(1.0)], more={"deep": [torch.tensor(2.0)]})
    assert seen == 3 * [[1.0, 2.0]]
