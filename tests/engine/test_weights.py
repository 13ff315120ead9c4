"""What is kept of pairs between sessions, and for how long."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from klora.cache import ScoreCache
from klora.engine.session import Session
from klora.engine.site import Site
from klora.engine.weights import KEPT, KeptWeights, PairWeights, Room, Weights
from klora.errors import LoraFileError
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


def test_of_another_type_than_the_file_there_is_one_copy(pairs: list[Pair]) -> None:
    weights = Weights(pairs[0].subject.modules[NAME])
    before = weights.nbytes()
    weights.chain(CPU, torch.bfloat16)
    assert weights.nbytes() == before / 2
    # Wanted in full after all, they are read again, and exact.
    down, _ = weights.chain(CPU, torch.float32).weights
    assert torch.equal(down, pairs[0].subject.modules[NAME].factors().down)


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
    parts = [part for delta in deltas for part in weights.of(delta).chain(meta, torch.float16).weights]
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


SECOND = NAME.replace("to_q", "to_k")
SHAPES = {NAME: (24, 16), SECOND: (24, 16)}
WHOLE = 4 * 24 * 16
"""Bytes of one full difference."""


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """A pair of full differences, of whose four there is room for three."""
    monkeypatch.setattr(Room, "__init__", lambda self, free=3 * WHOLE: setattr(self, "free", free))
    files = [write_lora(tmp_path / f"full-{i}.safetensors", SHAPES, seed=i, family="full") for i in (1, 2)]
    return Pair.open(files[0], files[1], ScoreCache(tmp_path))


def session_of(pair: Pair, layers: dict[str, nn.Linear]) -> Session:
    KEPT.clear()
    return Session(pair, pair.plan(Settings(engine="bypass")), {name: Site(layer) for name, layer in layers.items()})


def test_of_full_differences_no_more_is_held_than_there_is_room_for(full: Pair) -> None:
    weights = use(KeptWeights(), full)
    assert weights.nbytes() == 2 * WHOLE
    for file in (full.subject, full.style):
        weights.of(file.modules[SECOND])
    assert weights.nbytes() == 3 * WHOLE


def test_what_has_factors_is_held_whatever_room_there_is(pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Room, "__init__", lambda self, free=0: setattr(self, "free", free))
    assert use(KeptWeights(), pairs[0]).nbytes() == BYTES


@torch.no_grad()
def test_what_is_not_held_acts_all_the_same(full: Pair) -> None:
    layers, x = {name: nn.Linear(16, 24) for name in SHAPES}, torch.randn(3, 16)
    with session_of(full, layers) as session:
        for tau in (0.0, 0.95, 0.0):
            session.set_tau(tau)
            for name, layer in layers.items():
                active = session.plan.decide(name, tau)
                expected = layer.forward(x)
                for file, strength in ((full.subject, active.subject), (full.style, active.style)):
                    expected = expected + strength * x @ file.modules[name].matrix().t()
                torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_what_is_not_held_of_a_file_that_has_changed_ends_the_forward_and_leaves_nothing(full: Pair) -> None:
    layers, x = {name: nn.Linear(16, 24) for name in SHAPES}, torch.randn(3, 16)
    plain = {name: layer(x) for name, layer in layers.items()}

    def sample() -> None:
        with session_of(full, layers) as session:
            full.style.loras[0].path.unlink()
            for tau in (0.0, 0.95):
                session.set_tau(tau)
                for layer in layers.values():
                    layer(x)

    with pytest.raises(LoraFileError, match=r"full-2\.safetensors: does not exist"):
        sample()
    assert all(layer(x).equal(plain[name]) for name, layer in layers.items())


def test_room_is_free_again_once_what_took_it_is_gone(full: Pair) -> None:
    room = Room(WHOLE)
    first = Weights(full.subject.modules[NAME], room)
    assert room.free == 0
    assert Weights(full.subject.modules[SECOND], room).nbytes() == 0
    del first
    gc.collect()
    assert room.free == WHOLE
