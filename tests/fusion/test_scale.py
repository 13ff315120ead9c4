"""The scales, the comparison, and the steps at which its outcome switches."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from klora.fusion.scale import Scale, scale_s, scale_s_star, subject_wins, switch_steps

alphas = st.floats(0.01, 8)
betas = st.floats(0, 8)
steps = st.integers(1, 200)


def test_the_scales_are_those_of_the_paper() -> None:
    assert [scale_s(tau) for tau in (0, 0.5, 1)] == [0.5, 1.25, 2.0]
    assert scale_s_star(0) == 1.3
    assert scale_s_star(0.1) == pytest.approx(1.45)
    assert scale_s_star(0.2) == pytest.approx(0.1)
    assert scale_s_star(1) == pytest.approx(1.3)


def test_a_scale_is_of_its_kind() -> None:
    assert [Scale("s", 1.5, 0.5)(tau) for tau in (0.0, 0.5, 1.0)] == [0.5, 1.25, 2.0]
    assert [Scale("s*", 1.5, 1.25)(tau) for tau in (0.0, 0.5, 1.0)] == [1.25, 0.5, 1.25]
    assert [Scale("one")(tau) for tau in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]


def test_a_tie_goes_to_the_subject_and_in_the_official_variant_to_the_style() -> None:
    assert subject_wins(0.5, 0.5)
    assert not subject_wins(0.5, 0.5, strict=True)


@st.composite
def ratios(draw: st.DrawFn, scale: Scale, n: int) -> float:
    """Any ratio, and often one that ties with the scale at some step."""
    tie = scale(draw(st.integers(0, n)) / n)
    return draw(st.one_of(st.floats(0, 20), st.just(tie), st.just(math.inf)))


@given(st.data(), st.sampled_from(["s", "s*", "one"]), alphas, betas, steps, st.booleans(), st.floats(-2, 2))
def test_switch_steps_are_those_seen_step_by_step(
    data: st.DataObject, kind: str, alpha: float, beta: float, n: int, strict: bool, balance: float
) -> None:
    scale = Scale(kind, alpha, beta)
    rho = data.draw(ratios(scale, n))

    def wins(tau: float) -> bool:
        return subject_wins(rho, scale(tau), balance, strict)

    outcomes = [wins(i / n) for i in range(n)]
    seen = tuple(i for i in range(1, n) if outcomes[i] != outcomes[i - 1])
    assert switch_steps(wins, scale, n) == seen
    assert len(seen) <= {"one": 0, "s": 1, "s*": 2}[kind]


@pytest.mark.parametrize(("rho", "n", "expected"), [(0.5, 4, (1, 2)), (1.0, 2, (1,)), (0.1, 4, ())])
def test_a_drop_of_the_scale_right_after_the_first_step_is_seen(rho: float, n: int, expected: tuple[int, ...]) -> None:
    # S* at four steps: 1.3, 0.175, 0.55, 0.925; at two: 1.3, 0.55.
    scale = Scale("s*", 1.5, 1.3)
    assert switch_steps(lambda tau: subject_wins(rho, scale(tau)), scale, n) == expected


@given(st.floats(0, 10), st.floats(0.01, 4), st.floats(0, 4), st.integers(1, 100), st.floats(-2, 2))
def test_with_s_the_switch_is_where_the_closed_form_says(
    rho: float, alpha: float, beta: float, n: int, balance: float
) -> None:
    exact = n * (rho / 2**balance - beta) / alpha
    assume(abs(exact - round(exact)) > 1e-6)
    expected = min(max(math.floor(exact) + 1, 0), n)
    scale = Scale("s", alpha, beta)
    found = switch_steps(lambda tau: subject_wins(rho, scale(tau), balance), scale, n)
    assert found == ((expected,) if 0 < expected < n else ())
