"""EST-LoRA's d: a cosine of DINO's features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from klora.generation.discrepancy import discrepancy, pixels_of
from klora.vision import load_dino
from tests.support.studies import write_encoders


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoders(tmp_path_factory.mktemp("encoders"))[1]


@given(st.lists(st.integers(0, 99), min_size=1, max_size=3), st.lists(st.integers(0, 99), min_size=1, max_size=3))
def test_d_is_symmetric_and_one_for_equal_pictures(dino: Path, ours: list[int], theirs: list[int]) -> None:
    model = load_dino(str(dino), "cpu")
    left, right = (
        [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in seeds] for seeds in (ours, theirs)
    )
    assert discrepancy(model, left, right) == pytest.approx(discrepancy(model, right, left), abs=1e-6)
    assert discrepancy(model, left[:1], left[:1]) == pytest.approx(1.0, abs=1e-6)


def test_pixels_are_channels_first_from_zero_to_one() -> None:
    pixels = pixels_of(Image.new("RGBA", (3, 2), (255, 51, 0, 7)))
    assert pixels.shape == (3, 2, 3)
    assert pixels[:, 0, 0].tolist() == pytest.approx([1.0, 0.2, 0.0])
