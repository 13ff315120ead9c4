"""The parts of two LoRAs in a picture."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klora.balance.gain import gain
from klora.balance.parts import Parts, part

positive = st.floats(0.01, 1)


def test_on_average_a_lora_has_all_of_what_the_model_makes_with_it_and_nothing_of_what_it_makes_without() -> None:
    """In one dimension, where all is known: pictures are drawn around 0 without the LoRA and around 3 with it."""
    draw = torch.Generator().manual_seed(0)
    variance, sigma, count = 2.0, 1.5, 20_000

    def seen(noisy: torch.Tensor, mean: float) -> torch.Tensor:
        return mean + (noisy - mean) * variance / (variance + sigma**2)

    for mean, wanted in ((0.0, 0.0), (3.0, 1.0)):
        clean = mean + variance**0.5 * torch.randn(count, generator=draw)
        noisy = clean + sigma * torch.randn(count, generator=draw)
        assert part(gain(clean, seen(noisy, 0.0), seen(noisy, 3.0))) == pytest.approx(wanted, abs=0.05)


@given(st.integers(0, 999), st.floats(0, 1))
def test_a_picture_between_what_is_seen_without_and_with_a_lora_has_that_part_of_it(seed: int, t: float) -> None:
    base, lora = torch.randn((2, 1, 4, 6, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert part(gain(base + t * (lora - base), base, lora)) == pytest.approx(t)


@given(positive, positive)
def test_both_are_there_no_more_than_twice_the_lesser_and_no_less_than_it(subject: float, style: float) -> None:
    both, least = Parts(subject, style).both, min(subject, style)
    assert least - 1e-9 <= both <= 2 * least + 1e-9
    assert both == pytest.approx(Parts(style, subject).both)


@given(st.floats(-3, 0), st.floats(-3, 3))
def test_where_one_is_not_there_both_are_not(absent: float, other: float) -> None:
    assert Parts(absent, other).both == Parts(other, absent).both == 0


def test_parts_are_said_in_words_and_never_as_more_than_all_or_less_than_nothing() -> None:
    assert str(Parts(0.834, 0.91)) == "subject kept 83 %, style 91 %"
    assert str(Parts(-0.2, 1.3)) == "subject kept 0 %, style 100 %"
