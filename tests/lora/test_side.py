"""A side of several LoRAs: their weighted sum, seen as one."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from klora import cli
from klora.cache import ScoreCache
from klora.errors import LoraFileError, LoraValueError, MismatchError, SettingsError
from klora.fusion.scores import score_delta
from klora.lora.deltas import Delta
from klora.lora.deltas.computed import SumDelta, low_rank
from klora.lora.file import LoraFile
from klora.lora.side import Side, WeightedLora, read_side
from klora.pair import SAME_FILE, Pair, Pairs
from klora.settings import Settings
from tests.support.lora_files import FAMILIES, write_lora
from tests.support.scoring import score_all

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TO_Q, TO_K, CONV = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_k", "down_blocks.0.resnets.0.conv1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
SHAPES = {TO_Q: (24, 16), TO_K: (24, 20), CONV: (8, 12, 3, 3), TEXT: (16, 16)}
many = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
weights = st.floats(-4, 4).filter(lambda weight: abs(weight) > 0.01)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[LoraFile]:
    """A dog of rank 3, a coat of rank 4 in another spelling without to_k, and a hat of rank 2."""
    folder = tmp_path_factory.mktemp("loras")
    without = {name: shape for name, shape in SHAPES.items() if name != TO_K}
    return [
        LoraFile.open(write_lora(folder / "dog.safetensors", SHAPES, "kohya", rank=3, alpha=2.0, seed=1)),
        LoraFile.open(write_lora(folder / "coat.safetensors", without, "peft", rank=4, seed=2)),
        LoraFile.open(write_lora(folder / "hat.safetensors", SHAPES, "kohya", rank=2, seed=3)),
    ]


@pytest.fixture
def cache(tmp_path: Path) -> ScoreCache:
    return ScoreCache(tmp_path / "cache")


def side_of(*parts: tuple[LoraFile, float]) -> Side:
    return Side(tuple(WeightedLora(*part) for part in parts))


def test_a_side_of_one_is_the_file_itself(files: list[LoraFile], cache: ScoreCache) -> None:
    side = Side.alone(files[0])
    assert side.modules is files[0].modules
    assert side.text_encoder is files[0].text_encoder
    assert cache.scores(side) == score_all(files[0])
    assert [entry.name for entry in cache.folder.glob("scores-*")] == [f"scores-{files[0].sha256}-v2.json"]


@many
@given(weights, weights)
def test_a_side_is_the_weighted_sum_of_its_parts(files: list[LoraFile], one: float, other: float) -> None:
    dog, coat = files[:2]
    side = side_of((dog, one), (coat, other))
    for modules, of_dog, of_coat in (
        (side.modules, dog.modules, coat.modules),
        (side.text_encoder, dog.text_encoder, coat.text_encoder),
    ):
        assert modules.keys() == of_dog.keys()
        for name, delta in modules.items():
            expected = one * of_dog[name].matrix()
            if name in of_coat:
                expected += other * of_coat[name].matrix()
                assert delta.rank == 7
                up, down = low_rank(delta)
                assert torch.allclose((up @ down).view(delta.shape), expected, atol=1e-5)
            assert torch.allclose(delta.matrix(), expected, atol=1e-5)
            assert torch.allclose(delta.part(3, 7).matrix(), expected[3:7], atol=1e-5)


@many
@given(st.permutations(range(3)), st.tuples(weights, weights, weights))
def test_the_order_does_not_matter(
    files: list[LoraFile], cache: ScoreCache, order: list[int], each: tuple[float, float, float]
) -> None:
    given_order = side_of(*zip(files, each, strict=True))
    other = side_of(*((files[i], each[i]) for i in order))
    for name, delta in given_order.modules.items():
        assert torch.equal(delta.matrix(), other.modules[name].matrix())
    assert cache._key(given_order) == cache._key(other)


@many
@given(weights)
def test_a_weight_scales(files: list[LoraFile], cache: ScoreCache, weight: float) -> None:
    dog = files[0]
    once, scaled = cache.scores(Side.alone(dog)), cache.scores(side_of((dog, weight)))
    for name, score in scaled.items():
        assert score.l1 == pytest.approx(abs(weight) * once[name].l1)
        assert score.fro2 == pytest.approx(weight**2 * once[name].fro2)
        again = score_delta(side_of((dog, weight)).modules[name], score.sums)
        assert score.sums == pytest.approx(again.sums, rel=1e-5)
    # No entry of its own.
    assert len(list(cache.folder.glob("scores-*"))) == 1


def test_a_part_of_weight_0_is_as_if_it_were_not_there(files: list[LoraFile]) -> None:
    dog, coat = files[:2]
    assert side_of((dog, 1.0), (coat, 0.0)).modules is dog.modules
    assert not side_of((dog, 0.0)).modules


def test_sides_of_weight_0_are_not_one_file_and_have_no_block_that_could_be_missing(files: list[LoraFile]) -> None:
    dog, coat, _ = (file.path for file in files)
    assert SAME_FILE not in Pair.open((dog, 0.0), (coat, 0.0)).plan(Settings()).warnings
    plan = Pair.open((dog, 0.0), coat).plan(Settings(subject_blocks="down 0: 0.5"))
    assert set("".join(plan.selections.values())) == {"s"}


def test_a_sum_is_scored_once_and_kept(files: list[LoraFile], cache: ScoreCache) -> None:
    side = side_of((files[0], 0.8), (files[1], 0.5))
    scores = cache.scores(side)
    assert scores == {name: score_delta(delta, scores[name].sums) for name, delta in side.modules.items()}
    told: list[int] = []
    again = side_of((files[1], 0.5), (files[0], 0.8))
    assert cache.scores(again, on_scored=lambda done, _: told.append(done)) == scores
    assert not told
    cache.scores(side_of((files[1], 0.5), (files[0], 0.7)), on_scored=lambda done, _: told.append(done))
    assert told


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [TO_Q, CONV])
def test_any_family_may_stand_in_a_sum(tmp_path: Path, family: str, name: str) -> None:
    one = LoraFile.open(write_lora(tmp_path / "a.safetensors", {name: SHAPES[name]}, family=family, rank=2, seed=1))
    two = LoraFile.open(write_lora(tmp_path / "b.safetensors", {name: SHAPES[name]}, rank=3, seed=2))
    delta = side_of((one, 0.5), (two, -2.0)).modules[name]
    base = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(0))
    expected = 0.5 * one.modules[name].matrix(base) - 2.0 * two.modules[name].matrix(base)
    assert torch.allclose(delta.matrix(base), expected, atol=1e-5)
    assert isinstance(delta, SumDelta)
    assert delta.rank == one.modules[name].rank + 3
    assert (delta.factors() is not None) is family.startswith("lora")
    alone = side_of((one, -0.5)).modules[name]
    assert torch.allclose(alone.matrix(base), -0.5 * one.modules[name].matrix(base), atol=1e-5)
    assert alone.family == one.modules[name].family


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.startswith("dora")])
def test_a_sum_of_any_families_is_scored_a_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    shape = {CONV: SHAPES[CONV]}
    one = LoraFile.open(write_lora(tmp_path / "a.safetensors", shape, family=family, rank=2, seed=1))
    two = LoraFile.open(write_lora(tmp_path / "b.safetensors", shape, rank=3, seed=2))
    delta = side_of((one, 0.5), (two, -2.0)).modules[CONV]
    whole = delta.matrix()
    assert torch.allclose(delta.rows(2, 5), whole.reshape(8, -1)[2:5], atol=1e-6)
    monkeypatch.setattr(Delta, "matrix", lambda *_: pytest.fail("the whole was formed"))
    monkeypatch.setattr("klora.fusion.scores.BLOCK_ENTRIES", 3 * 12 * 9)
    score = score_delta(delta, [5])
    assert score.sums[5] == pytest.approx(float(whole.abs().flatten().topk(5).values.sum()), rel=1e-5)


def test_a_side_of_two_is_the_file_that_merge_writes_of_them(
    files: list[LoraFile], cache: ScoreCache, tmp_path: Path
) -> None:
    dog, coat, hat = files
    merged = tmp_path / "merged.safetensors"
    words = ["merge", str(dog.path), str(coat.path), "--policy", "direct", "--style-strength", "0.5"]
    assert cli.main([*words, "-o", str(merged), "--dtype", "float32"]) == 0
    style = [hat.path]
    one = Pair.open(merged, style, cache).plan(Settings())
    two = Pair.open([dog.path, (coat.path, 0.5)], style, cache).plan(Settings())
    assert [module.k for module in one.modules] == [module.k for module in two.modules]
    assert two.gamma == pytest.approx(one.gamma, rel=1e-5)
    for ours, theirs in zip(two.modules, one.modules, strict=True):
        assert ours.rho == pytest.approx(theirs.rho, rel=1e-5)
    assert one.selections == two.selections


def test_files_of_a_side_must_fit_each_other_and_the_other_side(tmp_path: Path, files: list[LoraFile]) -> None:
    wide = write_lora(tmp_path / "wide.safetensors", {TO_Q: (48, 32)})
    for sides in (([files[0].path, wide], files[2].path), (files[2].path, [files[0].path, wide])):
        with pytest.raises(MismatchError, match="wide"):
            Pair.open(*sides)


def test_nan_in_a_part_is_told_by_its_file_and_key(tmp_path: Path, files: list[LoraFile], cache: ScoreCache) -> None:
    path = write_lora(tmp_path / "bad.safetensors", SHAPES, rank=2, seed=9)
    tensors = load_file(path)
    key = next(key for key in tensors if "attn1_to_q.lora_up" in key)
    tensors[key][0, 0] = math.nan
    save_file(tensors, path)
    with pytest.raises(LoraValueError) as error:
        Pair.open([files[0].path, path], files[2].path, cache).plan(Settings())
    assert error.value.key == key
    assert "bad.safetensors" in str(error.value)


def test_pairs_know_sides_again(files: list[LoraFile], cache: ScoreCache) -> None:
    pairs, (dog, coat, hat) = Pairs(limit=8), (file.path for file in files)
    opened = [
        pairs.open(subject, hat, cache)
        for subject in (dog, [dog, coat], [dog, (coat, 0.5)], [(dog, 1.0), (coat, 0.5)], (dog, 0.5))
    ]
    assert len({id(pair) for pair in opened}) == 4
    assert opened[2] is opened[3]
    for one, other in itertools.combinations(opened[:3], 2):
        assert one.plan(Settings()) is not other.plan(Settings())


@pytest.mark.parametrize(
    "source",
    [
        [],
        3,
        b"dog.safetensors",
        [3],
        [("dog.safetensors", "much")],
        [("a", 1, 2)],
        ("dog.safetensors", math.nan),
        ("a", 11),
        torch.zeros(99, 99),
        [torch.zeros(99, 99)],
        [("a", torch.zeros(99, 99))],
    ],
    ids=lambda source: repr(source).partition("(")[0],
)
def test_what_is_no_side_is_refused_in_words(source: object) -> None:
    with pytest.raises(SettingsError, match=r"^subject: ") as caught:
        read_side(source, "subject")  # type: ignore[arg-type]
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    with pytest.raises(LoraFileError, match="nowhere"):
        Pair.open(["nowhere.safetensors"], "ink.safetensors")


def test_a_side_is_read_from_what_people_write() -> None:
    assert read_side("a", "subject") == [("a", 1.0)]
    assert read_side(("a", 0.5), "subject") == [("a", 0.5)]
    assert read_side(["a", Path("b"), ("c", 2)], "subject") == [("a", 1.0), (Path("b"), 1.0), ("c", 2.0)]
    assert read_side(("a", "b"), "subject") == [("a", 1.0), ("b", 1.0)]
    assert (
        read_side(("a", np.float32(0.5)), "subject") == read_side([("a", np.float32(0.5))], "subject") == [("a", 0.5)]
    )
    assert read_side({"x": torch.zeros(1)}, "subject")[0][1] == 1.0


def test_a_model_at_hand_names_every_part_and_the_same_names_are_the_same_side(files: list[LoraFile]) -> None:
    side = side_of((files[0], 0.8), (files[1], 1.0))
    assert side.bare() is side.bare()
    assert side.bare().modules.keys() == {name.replace(".", "_") for name in side.modules}
    assert side.name == "dog*0.8 + coat"
