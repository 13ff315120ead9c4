"""What is kept of pairs between sessions, and for how long."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from klora.cache import ScoreCache
from klora.engine.weights import KeptWeights, PairWeights, Weights
from klora.lora.file import LoraFile
from klora.pair import Pair
from klora.settings import Settings
from tests.support.lora_files import write_lora

NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CPU = torch.device("cpu")
BYTES = 4 * 2 * (16 + 24) * 4
"""Of one pair: fp32, two files, down (4, 16) and up (24, 4)."""


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    files = [write_lora(tmp_path / f"{i}.safetensors", {NAME: (24, 16)}, rank=4, seed=i) for i in range(4)]
    return [Pair.open(file, files[0], ScoreCache(tmp_path)) for file in files[1:]]


def use(kept: KeptWeights, pair: Pair) -> PairWeights:
    weights = kept.of(pair)
    for file in (pair.subject, pair.style):
        weights.of(file.modules[NAME])
    return weights


def test_the_latest_pairs_are_kept(pairs: list[Pair]) -> None:
    kept = KeptWeights(max_pairs=2)
    first, second, third = pairs
    old, newer = use(kept, first), use(kept, second)
    assert use(kept, first) is old
    use(kept, third)
    assert kept.of(first) is old
    assert kept.of(second) is not newer
    assert len(kept) == 2


def test_no_more_than_fits_is_kept_but_the_latest_always(pairs: list[Pair]) -> None:
    for max_bytes, count in ((2 * BYTES, 3), (2 * BYTES - 1, 2), (0, 1)):
        kept = KeptWeights(max_pairs=9, max_bytes=max_bytes)
        for pair in pairs:
            assert use(kept, pair).nbytes() == BYTES
        assert len(kept) == count
        assert kept.of(pair) is kept.of(pair)


def test_copies_of_another_type_count_and_those_of_the_same_do_not(pairs: list[Pair]) -> None:
    weights = Weights(pairs[0].subject.modules[NAME])
    before = weights.nbytes()
    weights.chain(CPU, torch.float32)
    assert weights.nbytes() == before
    weights.chain(CPU, torch.bfloat16)
    assert weights.nbytes() == before * 3 / 2


@pytest.mark.parametrize("family", ["lora", "loha", "lokr", "full"])
def test_the_weights_of_every_family_take_what_its_tensors_take(tmp_path: Path, family: str) -> None:
    file = LoraFile.open(write_lora(tmp_path / "a.safetensors", {NAME: (24, 16)}, family=family))
    delta = file.modules[NAME]
    assert Weights(delta).nbytes() == sum(tensor.nbytes for tensor in delta.tensors())


def test_joined_weights_are_made_once_and_lie_where_they_are_asked_for(pairs: list[Pair]) -> None:
    weights, meta = PairWeights(), torch.device("meta")
    deltas = tuple(file.modules[NAME] for file in (pairs[0].subject, pairs[0].style))
    down = weights.joined(deltas)
    assert weights.joined(deltas) is down
    assert down.stack(meta, torch.float16).shape == (8, 16)
    parts = [part for delta in deltas for part in weights.of(delta).chain(meta, torch.float16)]
    assert [(part.shape, part.device) for part in parts] == 2 * [((4, 16), meta), ((24, 4), meta)]


def test_nothing_outlives_the_pair_once_it_is_dropped(pairs: list[Pair]) -> None:
    kept = KeptWeights()
    weights = use(kept, pairs[0])
    weights.combined(Settings())[NAME] = (pairs[0].subject.modules[NAME], None)
    seen = weakref.ref(weights.of(pairs[0].subject.modules[NAME]))
    kept.clear()
    del weights
    gc.collect()
    assert len(kept) == 0
    assert seen() is None
