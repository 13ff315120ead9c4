"""Methods replaced on an instance, and put back as if nothing had been there."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

from klora.engine.wrapping import Wrappers


class Sampler:
    def step(self, x: int) -> int:
        return x + 1

    def other(self) -> str:
        return "other"


def twice(original: Any) -> Any:
    return lambda x: 2 * original(x)


def test_the_wrapper_stands_in_the_place_of_the_method_of_one_instance_alone() -> None:
    wrappers, one, other = Wrappers(), Sampler(), Sampler()
    wrappers.wrap(one, "step", twice)
    assert (one.step(1), other.step(1), Sampler.step(one, 1)) == (4, 2, 2)
    assert wrappers.has(one)
    assert not wrappers.has(other)


def test_removing_leaves_no_trace_of_a_method_of_the_class() -> None:
    wrappers, sampler = Wrappers(), Sampler()
    assert not wrappers
    wrappers.wrap(sampler, "step", twice)
    wrappers.wrap(sampler, "other", lambda original: lambda: original() + "!")
    assert wrappers
    assert sampler.other() == "other!"
    wrappers.remove()
    assert vars(sampler) == {}
    assert not wrappers
    assert not wrappers.has(sampler)
    assert sampler.step(1) == 2
    wrappers.remove()


def test_what_somebody_else_has_taken_off_meanwhile_is_left() -> None:
    wrappers, sampler = Wrappers(), Sampler()
    wrappers.wrap(sampler, "step", twice)
    del sampler.step
    wrappers.remove()
    assert sampler.step(1) == 2
    assert not wrappers


def test_a_method_that_was_the_instance_s_own_is_put_back() -> None:
    wrappers, sampler = Wrappers(), Sampler()
    own = sampler.step = lambda x: 10 * x  # type: ignore[method-assign, assignment]
    wrappers.wrap(sampler, "step", twice)
    assert sampler.step(1) == 20
    wrappers.remove()
    assert vars(sampler) == {"step": own}


def test_wrapping_twice_nests_and_comes_off_whole() -> None:
    wrappers, sampler = Wrappers(), Sampler()
    wrappers.wrap(sampler, "step", twice)
    wrappers.wrap(sampler, "step", lambda original: lambda x: original(x) + 100)
    assert sampler.step(1) == 104
    wrappers.remove()
    assert vars(sampler) == {}


def test_what_an_instance_has_not_is_not_made() -> None:
    wrappers, sampler = Wrappers(), Sampler()
    wrappers.wrap(sampler, "sample", twice)
    assert not wrappers
    assert not hasattr(sampler, "sample")
    sampler.maybe = None  # type: ignore[attr-defined]
    wrappers.wrap(sampler, "maybe", twice)
    assert sampler.maybe is None  # type: ignore[attr-defined]


def test_what_somebody_else_has_taken_off_is_not_missed() -> None:
    wrappers, sampler = Wrappers(), Sampler()
    wrappers.wrap(sampler, "step", twice)
    del sampler.step
    wrappers.remove()
    assert sampler.step(1) == 2


def test_wrappers_come_off_in_any_order_and_leave_nothing() -> None:
    def labelled(label: str) -> Any:
        return lambda original: lambda x: f"{label}({original(x)})"

    for order in itertools.permutations(range(3)):
        sampler, wrappers = Sampler(), [Wrappers() for _ in range(3)]
        for one, label in zip(wrappers, "abc", strict=True):
            one.wrap(sampler, "step", labelled(label))
        assert sampler.step(1) == "c(b(a(2)))"
        left = set(range(3))
        for index in order:
            wrappers[index].remove()
            left.discard(index)
            expected = "2"
            for still in sorted(left):
                expected = f"{'abc'[still]}({expected})"
            assert str(sampler.step(1)) == expected
        assert vars(sampler) == {}


def test_under_a_wrapper_of_somebody_else_s_ours_does_nothing_any_more() -> None:
    wrappers, sampler = Wrappers(), Sampler()
    wrappers.wrap(sampler, "step", twice)
    ours = sampler.step
    sampler.step = lambda x: ours(x) + 100  # type: ignore[method-assign]
    assert sampler.step(1) == 104
    wrappers.remove()
    assert sampler.step(1) == 102


def test_the_signature_of_a_method_is_still_told() -> None:
    wrappers, sampler = Wrappers(), Sampler()
    wrappers.wrap(sampler, "step", twice)
    wrappers.wrap(sampler, "step", twice)
    assert list(inspect.signature(sampler.step).parameters) == ["x"]


def test_what_lies_beneath_can_be_replaced_and_put_back_under_wrappers() -> None:
    around, beneath, sampler = Wrappers(), Wrappers(), Sampler()
    around.wrap(sampler, "step", twice)
    beneath.replace(sampler, "step", lambda x: 50)
    assert sampler.step(1) == 100
    beneath.remove()
    assert sampler.step(1) == 4
    around.remove()
    beneath.replace(sampler, "step", lambda x: 50)
    assert sampler.step(1) == 50
    beneath.remove()
    assert vars(sampler) == {}


def test_what_is_wrapped_beneath_acts_in_a_call_that_has_begun() -> None:
    around, beneath, sampler = Wrappers(), Wrappers(), Sampler()

    def beginning(original: Any) -> Any:
        def begin(x: int) -> int:
            beneath.wrap_beneath(sampler, "step", lambda inner: lambda x: inner(x) + 10)
            return 2 * original(x)

        return begin

    around.wrap(sampler, "step", beginning)
    assert sampler.step(1) == 24
    around.remove()
    assert sampler.step(1) == 12
    beneath.remove()
    assert vars(sampler) == {}
