"""The summary of a pair and its plan."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from klora.cache import ScoreCache
from klora.fusion.plan import FusionPlan
from klora.pair import Pair
from klora.report.overlap import overlap_of
from klora.report.summary import notices, sparkline, summarise
from klora.settings import Settings
from tests.support.lora_files import lora_tensors, write_lora
from tests.support.pairs import ATTENTION, FEED_FORWARD, shapes, write_pair


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair.open(*write_pair(tmp_path), ScoreCache(tmp_path / "cache"))


def summary_of(pair: Pair, plan: FusionPlan) -> str:
    return summarise(pair, plan, overlap_of(pair, plan))


def test_it_names_files_ranks_coverage_rule_and_share(pair: Pair) -> None:
    plan = pair.plan(Settings.parse({"balance": 0.25, "steps": 25}))
    text = summary_of(pair, plan)
    assert "dog.safetensors: 27 modules, rank 4 (lora)" in text
    assert "ink.safetensors: 24 modules, rank 8 (lora)" in text
    assert "contested 24 of 27 modules; subject only 3, style only 0, text encoder 1, keys not understood 0" in text
    assert f"γ = {plan.gamma:.4g}" in text
    assert "S(τ) = 1.5·τ + 0.5" in text
    assert "balance +0.25" in text
    assert f"subject {plan.share:.1%}, style {1 - plan.share:.1%} of 24 modules × 25 steps" in text


def test_it_says_where_the_alphas_are_from_unless_all_are_keys(tmp_path: Path) -> None:
    told, rest = (
        write_lora(tmp_path / f"{name}.safetensors", shapes(ATTENTION), spelling, rank=4, metadata=metadata)
        for name, spelling, metadata in (("told", "kohya", {"lora_alpha": "2"}), ("rest", "peft", {}))
    )
    pair = Pair.open(told, rest, ScoreCache(tmp_path / "cache"))
    text = summary_of(pair, pair.plan(Settings()))
    assert "told.safetensors: 24 modules, rank 4 (lora); alpha from metadata lora_alpha\n" in text
    assert "rest.safetensors: 24 modules, rank 4 (lora); alpha from the rank\n" in text
    keys = write_lora(tmp_path / "keys.safetensors", shapes(ATTENTION), rank=4, alpha=1.0)
    pair = Pair.open(keys, keys, ScoreCache(tmp_path / "cache"))
    assert "alpha from" not in summary_of(pair, pair.plan(Settings()))


def test_modules_of_rank_0_are_warned_of(tmp_path: Path) -> None:
    tensors = lora_tensors(shapes(ATTENTION), "kohya", rank=4, alpha=1.0)
    idle = next(key for key in tensors if key.endswith(".lora_down.weight")).removesuffix(".lora_down.weight")
    empty = {f"{idle}.lora_down.weight": torch.zeros(0, 32), f"{idle}.lora_up.weight": torch.zeros(32, 0)}
    save_file({**tensors, **empty}, tmp_path / "dog.safetensors")
    style = write_lora(tmp_path / "ink.safetensors", shapes(ATTENTION), rank=4, alpha=1.0)
    pair = Pair.open(tmp_path / "dog.safetensors", style, ScoreCache(tmp_path / "cache"))
    assert notices(pair, pair.plan(Settings())) == [
        f"dog.safetensors changes nothing in its modules of rank 0 (1), such as {idle}"
    ]


def test_it_lists_every_step_and_every_contested_block(pair: Pair) -> None:
    plan = pair.plan(Settings(steps=25))
    lines = summary_of(pair, plan).splitlines()
    table = [line.split("  ") for line in lines if line.startswith("   0–9 ") or line.strip()[:5] in ("10–19", "20–24")]
    numbers = [int(number) for row in table for number in " ".join(row).split()[1:]]
    assert numbers == [round(100 * share) for share in plan.subject_share()]
    assert sum(line.startswith(("down_blocks.0", "mid_block", "up_blocks.1")) for line in lines) == 3


def test_a_share_target_shows_the_balance_and_share_it_found(pair: Pair) -> None:
    plan = pair.plan(Settings(share=0.7))
    assert f"balance {plan.balance:+.3g}" in summary_of(pair, plan)
    assert plan.share == pytest.approx(0.7, abs=0.02)


def test_other_policies_are_named(pair: Pair) -> None:
    assert "no scale" in summary_of(pair, pair.plan(Settings(policy="top-k")))
    direct = summary_of(pair, pair.plan(Settings(policy="direct")))
    assert "both 100.0% of 24 modules" in direct
    assert "balance" not in direct


def test_what_is_decided_while_sampling_is_not_told_beforehand(pair: Pair) -> None:
    text = summary_of(pair, pair.plan(Settings(policy="dynamic")))
    assert "decided while sampling" in text
    assert "per step" not in text


def test_modules_outside_the_scope_are_counted(tmp_path: Path) -> None:
    files = [
        write_lora(tmp_path / f"{name}.safetensors", shapes([*ATTENTION, *FEED_FORWARD]), seed=seed)
        for seed, name in enumerate("ab")
    ]
    pair = Pair.open(*files, ScoreCache(tmp_path / "cache"))
    assert "3 modules of both files outside the scope" in summary_of(pair, pair.plan(Settings(scope="attention")))


def test_nothing_contested_is_said_and_warned_of(tmp_path: Path) -> None:
    files = [
        write_lora(tmp_path / f"{name}.safetensors", shapes(names), seed=1)
        for name, names in {"a": ATTENTION, "b": FEED_FORWARD}.items()
    ]
    pair = Pair.open(*files, ScoreCache(tmp_path / "cache"))
    plan = pair.plan(Settings())
    text = summary_of(pair, plan)
    assert "nothing is contested" in text
    assert "contested 0 of 27" in text
    assert "γ undefined" in text
    assert len(notices(pair, plan)) == 1


def test_what_has_no_number_shows_none(tmp_path: Path) -> None:
    block = shapes(ATTENTION[:1])
    dog, ink, coat = (write_lora(tmp_path / f"{i}.safetensors", block, alpha=float(i)) for i in range(3))
    pair = Pair.open(dog, ink, ScoreCache(tmp_path / "cache"))
    *_, row = summary_of(pair, pair.plan(Settings(steps=2))).splitlines()
    assert row.split() == ["down_blocks.0", "1", "0.0%", "–", "–", "–", "never"]
    pair = Pair.open(ink, coat, ScoreCache(tmp_path / "cache"))
    *_, row = summary_of(pair, pair.plan(Settings(steps=2))).splitlines()
    assert row.split() == ["down_blocks.0", "1", "50.0%", "1", "1", "1", "1", "(1", "of", "1", "module)"]


def test_a_file_on_both_sides_is_warned_of_once(tmp_path: Path) -> None:
    key = f"lora_unet_{ATTENTION[0].replace('.', '_')}"
    path = tmp_path / "idle.safetensors"
    save_file({f"{key}.lora_down.weight": torch.zeros(0, 32), f"{key}.lora_up.weight": torch.zeros(32, 0)}, path)
    pair = Pair.open(path, path, ScoreCache(tmp_path / "cache"))
    same, zero, idle = notices(pair, pair.plan(Settings()))
    assert "same file" in same
    assert zero == "both LoRAs are zero on every contested module, so γ is undefined"
    assert "rank 0" in idle


def test_a_sparkline_has_one_bar_per_step_up_to_its_width() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert len(sparkline([0.5] * 1000, width=60)) == 60
