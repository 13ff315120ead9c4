"""What a tag asks for, with its files opened."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from klora.cache import ScoreCache
from klora.pair import Pair
from klora.settings import Settings
from klora.webui.prompt_tag import Tag
from klora.webui.requested_fusion import RequestedFusion
from klora.webui.sides import SideLora
from tests.support.lora_files import write_lora

CLIP = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
T5 = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"


def requested(folder: Path, side: list[tuple[str, float]], **settings: Any) -> RequestedFusion:
    for seed, name in enumerate([*(name for name, _ in side), "ink"]):
        write_lora(folder / f"{name}.safetensors", {CLIP: (16, 16), T5: (16, 16)}, rank=2, seed=seed)
    files: list[Any] = [(folder / f"{name}.safetensors", weight) for name, weight in side]
    pair = Pair.open(files, folder / "ink.safetensors", ScoreCache(folder / "cache"))
    listed = [SideLora(name, SimpleNamespace(name=name), weight) for name, weight in [*side, ("ink", 1.0)]]  # type: ignore[arg-type]
    given = Settings(**settings)
    return RequestedFusion(Tag("subject", "ink", given), tuple(listed[:-1]), tuple(listed[-1:]), pair, given)


def parts_of(fusion: RequestedFusion) -> list[tuple[str, float, set[str]]]:
    return [(part.lora.name, part.strength, set(part.deltas)) for part in fusion.text_parts()]


def test_each_file_of_a_side_acts_in_the_text_encoders_with_its_weight(tmp_path: Path) -> None:
    fusion = requested(tmp_path, [("dog", 0.5), ("coat", -2.0), ("hat", 0.0)], subject_strength=0.5)
    both = {CLIP, T5}
    assert parts_of(fusion) == [("dog", 0.25, both), ("coat", -1.0, both), ("ink", 1.0, both)]


def test_text_encoders_with_multipliers_of_their_own_are_parts_of_their_own(tmp_path: Path) -> None:
    fusion = requested(tmp_path, [("dog", 0.5)], subject_blocks="t5: 0.5", style_blocks="base: 0")
    assert parts_of(fusion) == [("dog", 0.5, {CLIP}), ("dog", 0.25, {T5})]
