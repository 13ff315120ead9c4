"""Pictures of a grid of shares, judged by the LoRAs themselves on a real host."""

from __future__ import annotations

import numpy as np
import pytest

from tests.hosts_real.server import Picture, Server

TAG = "<klora:subj:style>"
SHARES = (0.4, 0.6, 0.8)
JUDGED = [("[K-LoRA] Judged share", "0.4, 0.6, 0.8")]


@pytest.mark.parametrize("sampler", ["Euler", "DDIM", "DPM++ 2M"])
def test_cells_are_the_same_pictures_with_their_figures_below(server: Server, plain: Picture, sampler: str) -> None:
    grid = server.plot(JUDGED, TAG, sampler_name=sampler, steps=8)
    assert "has most of both" in grid.comments or "finds nothing of its own" in grid.comments
    assert "not judged" not in grid.comments
    height = plain.pixels.shape[0]
    for cell, share in zip(grid.all[-len(SHARES) :], SHARES, strict=True):
        alone = server.txt2img(f"<klora:subj:style:share={share}>", sampler_name=sampler, steps=8)
        assert cell.shape[0] > height
        assert np.array_equal(cell[:height], alone.pixels)


def test_a_picture_with_a_hires_pass_is_made_and_not_judged(server: Server, plain: Picture) -> None:
    hires = {"enable_hr": True, "hr_scale": 1.5, "hr_upscaler": server.upscaler, "hr_second_pass_steps": 4}
    # Forge fails without these two.
    hires |= {"hr_additional_modules": ["Use same choices"], "hr_cfg": 5}
    grid = server.plot(JUDGED, TAG, denoising_strength=0.6, **hires)
    assert len({cell.shape for cell in grid.all[-len(SHARES) :]}) == 1
    assert grid.all[-1].any()
    assert "not judged" in grid.comments
