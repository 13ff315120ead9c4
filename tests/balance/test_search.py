"""Which share is taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klora.balance.parts import Parts
from klora.balance.search import SHARES, Candidate, best_of, check_findable
from klora.errors import KloraError
from klora.settings import Settings


def candidates(*parts: tuple[float, float]) -> list[Candidate]:
    return [Candidate(share, Parts(*both)) for share, both in zip(SHARES, parts, strict=False)]


@given(st.floats(0.45, 0.75), st.floats(0.1, 1))
def test_a_parabola_has_its_peak_at_the_candidate_nearest_to_it(peak: float, depth: float) -> None:
    values = [1 - depth * (share - peak) ** 2 for share in SHARES]
    found = best_of(candidates(*((value, value) for value in values)))
    assert abs(found.share - peak) <= min(abs(share - peak) for share in SHARES) + 1e-6


def test_one_lucky_picture_does_not_decide() -> None:
    assert best_of(candidates((0.55, 0.55), (0.3, 0.3), (0.4, 0.4), (0.5, 0.5), (0.6, 0.6))).share == 0.8


def test_more_of_one_does_not_make_up_for_none_of_the_other() -> None:
    assert best_of(candidates((0.0, 1.0), (0.4, 0.4))).share == 0.5


@pytest.mark.parametrize(("side", "parts"), [("subject", (-0.1, 0.9)), ("style", (0.9, 0.0))])
def test_a_lora_with_no_part_anywhere_is_an_error_that_names_its_side(side: str, parts: tuple[float, float]) -> None:
    with pytest.raises(KloraError, match=f"the {side}'s LoRA"):
        best_of(candidates(*[parts] * 5))


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"policy": "direct"}, "policy"), ({"share": 0.5}, "share"), ({"balance": -1}, "share"), ({"steps": 1}, "steps")],
)
def test_what_has_no_share_or_has_it_already_cannot_be_asked_for_one(settings: dict[str, object], named: str) -> None:
    with pytest.raises(KloraError, match=f"^{named}: "):
        check_findable(Settings.parse(settings))
    check_findable(Settings(steps=2))
