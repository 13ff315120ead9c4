"""The benchmarks of cost run: other families in every way, and the picture of how cost grows."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from PIL import Image

from bench.cost import PANELS, draw
from bench.families import FAMILIES, FORMED, forwards


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_measured_in_its_ways(family: str) -> None:
    found = forwards(family, 4, 64, 1, time.perf_counter, shrink=20)
    assert found.keys() == {"no LoRA", "merged", "products", "held"} | (
        {"products, no room", "held, no room"} if family in FORMED else set()
    )
    assert all(seconds > 0 for seconds in found.values())


def test_cost_is_drawn_as_one_picture(tmp_path: Path) -> None:
    curves = {"K-LoRA": {1.0: 1.1, 64.0: 1.2}, "bare products": {1.0: 1.0, 64.0: 1.1}}
    draw({"machine": "a machine", **{name: curves for name, *_ in PANELS}}, tmp_path / "cost.png")
    with Image.open(tmp_path / "cost.png") as picture:
        assert picture.size == (1200, 840)
