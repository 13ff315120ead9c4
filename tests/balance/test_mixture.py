"""What a denoiser is shown, and the picture that its prediction means."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klora.balance.mixture import Mixture, Prediction

kinds = st.sampled_from(get_args(Prediction))
levels = st.floats(0.01, 50)


def truth(kind: Prediction, mixture: Mixture, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What a perfect model predicts."""
    return {
        "epsilon": noise,
        "v_prediction": mixture.signal * noise - mixture.noise * clean,
        "sample": clean,
        "flow": noise - clean,
    }[kind]


@given(kinds, levels, st.integers(0, 99))
def test_a_perfect_prediction_of_any_kind_means_the_picture_itself(kind: Prediction, sigma: float, seed: int) -> None:
    clean, noise = torch.randn((2, 4, 6), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mixture = Mixture.at_level(sigma, kind)
    found = mixture.clean(mixture.of(clean, noise), truth(kind, mixture, clean, noise))
    torch.testing.assert_close(found, clean)


@given(kinds, levels)
def test_the_noise_is_as_many_times_as_strong_as_the_level_says(kind: Prediction, sigma: float) -> None:
    mixture = Mixture.at_level(sigma, kind)
    assert mixture.level == pytest.approx(sigma)
    assert mixture.noise / mixture.signal == pytest.approx(sigma)


@given(levels)
def test_signal_and_noise_add_up_to_one_for_flows_and_their_squares_for_all_others(sigma: float) -> None:
    flow, other = Mixture.at_level(sigma, "flow"), Mixture.at_level(sigma, "epsilon")
    assert flow.signal + flow.noise == pytest.approx(1)
    assert other.signal**2 + other.noise**2 == pytest.approx(1)
