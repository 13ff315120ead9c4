"""A pair: checked when opened, planned with the scores of both files, and what is active in the text encoders."""

from __future__ import annotations

from pathlib import Path

import pytest

from klora.cache import ScoreCache
from klora.errors import LoraFileError, MismatchError
from klora.fusion.policies.base import BOTH, NEITHER, STYLE, SUBJECT
from klora.lora.model_index import ModelIndex
from klora.pair import MAX_PLANS, Pair
from klora.settings import Settings
from tests.support.lora_files import write_lora
from tests.support.pairs import ATTENTION, FEED_FORWARD, TEXT, shapes, write_pair

CONV = "down_blocks.0.resnets.0.conv1"
OTHER_TEXT = TEXT.replace("q_proj", "k_proj")


@pytest.fixture
def cache(tmp_path: Path) -> ScoreCache:
    return ScoreCache(tmp_path / "cache")


def test_files_of_different_models_are_refused_when_opened(tmp_path: Path, cache: ScoreCache) -> None:
    subject, _ = write_pair(tmp_path)
    style = write_lora(tmp_path / "other.safetensors", dict.fromkeys(ATTENTION, (48, 32)))
    with pytest.raises(MismatchError, match="other"):
        Pair.open(subject, style, cache)
    with pytest.raises(LoraFileError, match="nowhere"):
        Pair.open(subject, tmp_path / "nowhere.safetensors", cache)


def test_the_scope_says_which_common_modules_are_contested(tmp_path: Path, cache: ScoreCache) -> None:
    names = {**shapes([*ATTENTION, *FEED_FORWARD]), CONV: (32, 32, 3, 3)}
    files = [write_lora(tmp_path / f"{seed}.safetensors", names, rank=4, seed=seed) for seed in (1, 2)]
    pair = Pair.open(*files, cache)
    assert set(pair.coverage.contested) == set(names)
    for scope, expected in (
        ("attention", {*ATTENTION}),
        ("linear", {*ATTENTION, *FEED_FORWARD}),
        ("all", {*names}),
    ):
        plan = pair.plan(Settings(scope=scope, other_layers="style"))
        assert {module.name for module in plan.contested} == expected
        outside = set(names) - expected
        assert all(plan.decide(name, 0.0) == STYLE for name in outside)


def test_only_what_is_contested_is_scored(tmp_path: Path, cache: ScoreCache) -> None:
    names = shapes([*ATTENTION, *FEED_FORWARD])
    files = [write_lora(tmp_path / f"{seed}.safetensors", names, rank=4, seed=seed) for seed in (1, 2)]
    for scope, count in (("attention", len(ATTENTION)), ("linear", len(names)), ("all", len(names))):
        told: list[tuple[int, int]] = []
        Pair.open(*files, cache).plan(Settings(scope=scope), on_scored=lambda *args, told=told: told.append(args))
        # What is known needs no scoring: of the second scope the rest is new, of the third nothing.
        assert (told[-1][1] if told else 0) == {"attention": 2 * count, "linear": 2 * count, "all": 0}[scope]
        assert len(told) <= 2 * len(ATTENTION) + 1


def test_modules_of_one_file_are_its_own(tmp_path: Path, cache: ScoreCache) -> None:
    pair = Pair.open(*write_pair(tmp_path), cache)
    plan = pair.plan(Settings())
    for name in FEED_FORWARD:
        module = plan.by_name[name]
        assert (module.contested, module.style_name, module.k) == (False, None, None)
        assert (module.subject_name or "").startswith("lora_unet_")
        assert plan.decide(name, 0.9) == SUBJECT
    swapped = Pair.open(pair.style.loras[0].path, pair.subject.loras[0].path, cache).plan(Settings())
    assert all(swapped.decide(name, 0.0) == STYLE for name in FEED_FORWARD)


def test_sums_are_those_of_the_k_that_the_ranks_make(tmp_path: Path, cache: ScoreCache) -> None:
    pair = Pair.open(*write_pair(tmp_path), cache)
    name = ATTENTION[0]
    for settings, k in ((Settings(), 4 * 8), (Settings(k=5), 5)):
        module = pair.plan(settings).by_name[name]
        for file, found in ((pair.subject, module.subject_sum), (pair.style, module.style_sum)):
            largest = file.modules[name].matrix().abs().flatten().sort(descending=True).values[:k]
            assert module.k == k
            assert found == pytest.approx(float(largest.double().sum()), rel=1e-6)


def test_the_model_at_hand_counts_more_than_the_files(tmp_path: Path, cache: ScoreCache) -> None:
    pair = Pair.open(*write_pair(tmp_path), cache)
    assert pair.for_model(ModelIndex({}, architecture="FLUX")).plan(Settings()).settings.scale == "s*"
    assert pair.plan(Settings()).settings.scale == "s"


@pytest.mark.parametrize(
    ("who", "expected"), [("both", BOTH), ("subject", SUBJECT), ("style", STYLE), ("none", NEITHER), ("auto", BOTH)]
)
def test_text_encoders_are_active_by_role_and_only_where_a_file_has_them(
    tmp_path: Path, cache: ScoreCache, who: str, expected: object
) -> None:
    names = shapes(ATTENTION)
    size = (32, 32)
    subject = write_lora(tmp_path / "a.safetensors", {**names, TEXT: size, OTHER_TEXT: size}, seed=1)
    style = write_lora(tmp_path / "b.safetensors", {**names, TEXT: size}, seed=2)
    active = Pair.open(subject, style, cache).text_encoder_active(Settings(text_encoder=who))
    assert active[TEXT] == expected
    assert active[OTHER_TEXT] == (expected.subject, 0.0)  # type: ignore[attr-defined]


def test_the_official_variant_and_b_lora_leave_text_encoders_out(tmp_path: Path, cache: ScoreCache) -> None:
    pair = Pair.open(*write_pair(tmp_path), cache)
    for settings in (Settings(variant="official"), Settings(policy="b-lora")):
        assert set(pair.text_encoder_active(settings).values()) == {NEITHER}


def test_a_plan_is_made_once_for_the_same_settings(tmp_path: Path, cache: ScoreCache) -> None:
    pair = Pair.open(*write_pair(tmp_path), cache)
    plan = pair.plan(Settings())
    assert pair.plan(Settings()) is plan
    assert pair.for_model(ModelIndex({}, architecture="FLUX")).plan(Settings()) is not plan
    assert pair.for_model(ModelIndex({})).plan(Settings()) is plan
    assert pair.plan(Settings(balance=1.0)).balance == 1.0
    for step in range(MAX_PLANS):
        pair.plan(Settings(steps=step + 1))
    assert len(pair._plans) == MAX_PLANS
    assert pair.plan(Settings()) == plan


def test_a_scoring_of_which_a_part_was_known_is_told_to_its_end(tmp_path: Path, cache: ScoreCache) -> None:
    pair, heard = Pair.open(*write_pair(tmp_path), cache), []
    cache.scores(pair.style)
    pair.plan(Settings(), on_scored=lambda done, total: heard.append(done / total))
    assert heard == sorted(heard)
    assert heard[-1] == 1.0


def test_the_scoring_of_both_files_is_told_as_one(tmp_path: Path, cache: ScoreCache) -> None:
    pair, heard = Pair.open(*write_pair(tmp_path), cache), []
    pair.plan(Settings(), on_scored=lambda *args: heard.append(args))
    total = 2 * len(pair.coverage.contested)
    assert heard == [(done + 1, total) for done in range(total)]
    pair.plan(Settings(balance=1.0), on_scored=lambda *_: pytest.fail("scored again"))
