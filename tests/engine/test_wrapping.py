"""Methods replaced on an instance, and put back as if nothing had been there."""

from __future__ import annotations

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
