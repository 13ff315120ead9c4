"""The gain of a LoRA on a picture."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klora.balance.gain import gain

seeds, levels = st.integers(0, 999), st.floats(0.05, 20)


def pictures(seed: int) -> tuple[torch.Tensor, ...]:
    """A picture, and what is seen of it without and with a LoRA."""
    return tuple(torch.randn((3, 1, 4, 6, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


@given(seeds, levels)
def test_it_is_the_fall_of_the_denoising_error_relative_to_the_change_at_any_level(seed: int, sigma: float) -> None:
    clean, base, lora = pictures(seed)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    noisy = clean + sigma * noise
    of_base, of_lora = ((noisy - seen) / sigma for seen in (base, lora))
    fall = (of_base - noise).square().sum() - (of_lora - noise).square().sum()
    assert gain(clean, base, lora) == pytest.approx(float(fall / (of_lora - of_base).square().sum()))


@given(seeds)
def test_it_is_one_where_the_picture_is_what_the_lora_sees_and_minus_one_where_it_is_what_the_model_sees(
    seed: int,
) -> None:
    _, base, lora = pictures(seed)
    assert gain(lora, base, lora) == pytest.approx(1)
    assert gain(base, base, lora) == pytest.approx(-1)


@given(seeds, st.floats(0.1, 10))
def test_a_stronger_change_counts_as_much_where_the_picture_went_as_far(seed: int, factor: float) -> None:
    clean, base, lora = pictures(seed)
    stretched = [base + factor * (one - base) for one in (clean, lora)]
    assert gain(stretched[0], base, stretched[1]) == pytest.approx(gain(clean, base, lora))


@given(seeds)
def test_a_lora_that_changes_nothing_gains_as_little_as_where_it_is_not_there(seed: int) -> None:
    clean, base, _ = pictures(seed)
    assert gain(clean, base, base) == -1
