"""The benchmark of an analysis runs."""

from __future__ import annotations

from pathlib import Path

from bench.analysis import overlaps
from bench.scoring import write_file
from klora.lora.file import LoraFile

SHAPES = {f"mid_block.attentions.0.transformer_blocks.0.attn1.{name}": (24, 16) for name in ("to_q", "to_k")}


def test_overlaps_are_found_in_both_ways(tmp_path: Path) -> None:
    subject, style = (LoraFile.open(write_file(tmp_path / f"{seed}.safetensors", SHAPES, 4, seed)) for seed in (1, 2))
    assert all(seconds > 0 for seconds in overlaps(subject, style, 1))
