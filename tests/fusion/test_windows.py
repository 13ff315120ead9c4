"""When and where each side acts: windows of the schedule and multipliers by block, under every policy."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from klora.cache import ScoreCache
from klora.engine.session import Session
from klora.engine.site import Site
from klora.errors import SettingsError
from klora.fusion.plan import FusionPlan
from klora.fusion.policies import POLICIES, make_policy
from klora.fusion.policies.base import NEITHER, STYLE, SUBJECT, Active
from klora.fusion.windows import Window, Windows
from klora.merge import check_static
from klora.pair import Pair
from klora.settings import Settings
from tests.support.lora_files import write_lora
from tests.support.pairs import ATTENTION, FEED_FORWARD, TEXT, plan_of, shapes, write_pair

parts = st.sampled_from([0.0, 0.2, 0.25, 0.4, 0.5, 1.0])
UP = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
"""In a block of B-LoRA's too."""


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair.open(*write_pair(tmp_path), ScoreCache(tmp_path / "cache"))


def letters(plan: FusionPlan) -> dict[str, str]:
    return dict(plan.selections)


@given(parts, parts, st.floats(0, 1))
def test_a_window_holds_from_its_start_up_to_its_end_and_the_last_moment_of_the_schedule(
    start: float, stop: float, tau: float
) -> None:
    window = Window(min(start, stop), max(start, stop))
    assert window.holds(tau) is (window.start <= tau < window.stop or (window.start < 1 == window.stop == tau)) or (
        min(abs(tau - window.start), abs(tau - window.stop)) < 1e-8
    )


@given(st.sampled_from([*POLICIES]), st.integers(1, 40))
def test_windows_from_0_to_1_change_nothing(policy: str, steps: int) -> None:
    plan = plan_of([*ATTENTION, UP], policy=policy, steps=steps)
    told = plan_of([*ATTENTION, UP], policy=policy, steps=steps, subject_from=0, subject_to=1, style_to=1)
    assert told == plan
    assert letters(told) == letters(plan)


@given(st.sampled_from([*POLICIES]), parts, parts, parts, parts, st.integers(1, 40))
def test_outside_of_its_window_a_side_does_not_act_and_the_other_acts_alone(
    policy: str, a: float, b: float, c: float, d: float, steps: int
) -> None:
    windows = {"subject_from": min(a, b), "subject_to": max(a, b), "style_from": min(c, d), "style_to": max(c, d)}
    if a == b and c == d:
        with pytest.raises(SettingsError, match="neither"):
            plan_of(ATTENTION, policy=policy, **windows)
        return
    names = [*ATTENTION[:: len(ATTENTION) // 3], UP]
    plan = plan_of(names, policy=policy, steps=steps, **windows)
    free = plan_of(names, policy=policy, steps=steps)
    selections = {name: plan.selection(name) for name in names}
    for i in range(steps):
        subject, style = plan.windows.open_at(i / steps)
        for name in names:
            found = plan.decide(name, i / steps)
            if subject and style:
                assert found == free.decide(name, i / steps)
            else:
                assert found == Active(float(subject), float(style))
            assert selections[name][i] == found.letter
        assert bool(plan.predictions(i / steps)) is (bool(free.predictions(i / steps)) and subject and style)


def test_a_window_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"style_from: 0.6 lies behind style_to"):
        Windows.of(Settings(style_from=0.6, style_to=0.4))
    with pytest.raises(SettingsError, match="one file cannot hold"):
        check_static(Settings(policy="direct", style_from=0.5))


def test_a_share_counts_what_a_window_gives(pair: Pair) -> None:
    plan = pair.plan(Settings(steps=10, style_from=0.4, share=0.7))
    assert plan.share == pytest.approx(0.7, abs=0.05)
    assert set(plan.subject_share()[:4]) == {1.0}


def session(pair: Pair, layers: dict[str, nn.Linear], **settings: Any) -> Session:
    plan = pair.plan(Settings.parse({"steps": 4, **settings}))
    return Session(pair, plan, {name: Site(layer) for name, layer in layers.items()})


@torch.no_grad()
def outputs(pair: Pair, layers: dict[str, nn.Linear], tau: float, **settings: Any) -> torch.Tensor:
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with session(pair, layers, **settings) as attached:
        attached.set_tau(0.9 - tau)
        attached.set_tau(tau)
        return torch.stack([layer(x) for layer in layers.values()])


# B-LoRA refuses a pair and a model without its two blocks.
@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "b-lora"])
def test_a_side_whose_window_is_never_open_leaves_the_other_alone(pair: Pair, policy: str) -> None:
    torch.manual_seed(0)
    layers = {name: nn.Linear(32, 32) for name in (*ATTENTION[:4], *FEED_FORWARD[:1])}
    for closed, own in (("style", "subject"), ("subject", "style")):
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        modules = getattr(pair, own).modules
        with torch.no_grad():
            alone = torch.stack(
                [
                    layer(x) + (0.7 * x @ modules[name].matrix().t() if name in modules else 0.0)
                    for name, layer in layers.items()
                ]
            )
        found = outputs(pair, layers, 0.3, policy=policy, **{f"{closed}_to": 0.0, f"{own}_strength": 0.7})
        assert torch.allclose(found, alone, atol=1e-4)
        half = {f"{closed}_from": 0.5, f"{own}_strength": 0.7}
        assert torch.allclose(outputs(pair, layers, 0.25, policy=policy, **half), alone, atol=1e-4)
        together = outputs(pair, layers, 0.75, policy=policy, **half)
        plain = outputs(pair, layers, 0.75, policy=policy, **{f"{own}_strength": 0.7})
        assert torch.allclose(together, plain, atol=1e-5)


class TestBlocks:
    def test_blocks_at_1_change_nothing(self, pair: Pair) -> None:
        for policy in POLICIES:
            plain = pair.plan(Settings(policy=policy))
            told = pair.plan(Settings(policy=policy, subject_blocks="mid: 1, up 1: 1", style_blocks="down 0=1"))
            assert told.modules == plain.modules
            assert letters(told) == letters(plain)

    def test_what_is_scored_stays_and_what_acts_is_multiplied(self, pair: Pair) -> None:
        plan, plain = pair.plan(Settings(subject_blocks="mid: 0.5")), pair.plan(Settings())
        assert plan.gamma == plain.gamma
        for module, as_before in zip(plan.modules, plain.modules, strict=True):
            assert module.rho == as_before.rho
            found, before = plan.decide(module.name, 0.0), plain.decide(module.name, 0.0)
            factor = 0.5 if module.name.startswith("mid_block") else 1.0
            assert found == (before.subject * factor, before.style)

    def test_a_block_at_0_is_the_others_and_counts_for_nothing(self, pair: Pair) -> None:
        plan = pair.plan(Settings(subject_blocks="mid: 0", steps=8))
        for module in plan.modules:
            if module.name.startswith("mid_block"):
                assert not module.contested
                assert module.rho is None
                expected = STYLE if module.style_name else NEITHER
                assert {plan.decide(module.name, i / 8) for i in range(8)} == {expected}
        contested = [module.name for module in pair.plan(Settings()).contested if "mid_block" not in module.name]
        assert [module.name for module in plan.contested] == contested
        assert plan.gamma != pair.plan(Settings()).gamma
        both = pair.plan(Settings(subject_blocks="mid: 0", style_blocks="mid: 0"))
        assert {both.decide(name, 0.5) for name in both.by_name if name.startswith("mid_block")} == {NEITHER}

    def test_where_neither_side_acts_in_any_block_it_is_refused(self, pair: Pair) -> None:
        nothing = "down 0: 0, mid: 0, up 1: 0"
        with pytest.raises(SettingsError, match="neither side acts in any block"):
            pair.plan(Settings(subject_blocks=f"{nothing}, base: 0", style_blocks=nothing))
        pair.plan(Settings(subject_blocks=nothing, style_blocks=nothing))
        pair.plan(Settings(subject_blocks=f"{nothing}, base: 0"))

    def test_a_text_that_is_none_is_refused_before_any_file_is_opened(self) -> None:
        with pytest.raises(SettingsError, match=r"^style_blocks: 'mid' is not a block with its multiplier"):
            make_policy(Settings(style_blocks="mid").resolve(None))

    def test_alone_a_side_keeps_its_multipliers(self, pair: Pair) -> None:
        plan = pair.plan(Settings(subject_blocks="mid: 0.5", style_from=0.5))
        assert {plan.decide(name, 0.2) for name in plan.by_name} == {SUBJECT, Active(0.5, 0.0)}

    @pytest.mark.parametrize("policy", ["ties", "dare", "knots", "lego", "magnitude-prune", "direct", "np-lora"])
    def test_a_merge_takes_the_multipliers_as_strengths(self, tmp_path: Path, policy: str) -> None:
        names = [name for name in ATTENTION if name.startswith("mid_block")][:2]
        files = [write_lora(tmp_path / f"{seed}.safetensors", shapes(names), rank=4, seed=seed) for seed in (1, 2)]
        pair = Pair.open(*files, ScoreCache(tmp_path / "cache"))
        torch.manual_seed(0)
        layers = {name: nn.Linear(32, 32) for name in names}
        by_block = outputs(pair, layers, 0.3, policy=policy, subject_blocks="mid: 0.5", style_blocks="mid: -2")
        by_strength = outputs(pair, layers, 0.3, policy=policy, subject_strength=0.5, style_strength=-2)
        assert torch.allclose(by_block, by_strength, atol=1e-5)

    def test_a_text_encoder_is_a_block_too(self, pair: Pair) -> None:
        for name in ("base", "text_encoder"):
            assert pair.text_encoder_active(Settings(subject_blocks=f"{name}: 0.5"))[TEXT] == (0.5, 0.0)
            pair.plan(Settings(subject_blocks=f"{name}: 0.5"))
        assert pair.text_encoder_active(Settings(subject_blocks="mid: 0.5"))[TEXT] == (1.0, 0.0)

    @pytest.mark.parametrize(
        ("blocks", "said"),
        [
            ("upp 1: 0.5", "'upp.1' is no block of these LoRAs; there are down 0, mid, up 1"),
            ("mid", "is not a block with its multiplier"),
            (": 1", "is not a block with its multiplier"),
            ("mid: much", "'much' is not a weight"),
            ("mid: 11", "is not a weight"),
            ("1,0,1", "a vector of 3 values is none of those known"),
            (",".join("1" * 12), "the vector is for SDXL, the LoRAs are for"),
            ("fluxall", "the vector is for FLUX, the LoRAs are for"),
            ("MINE", "'MINE' is not a block with its multiplier, such as up 1: 0.5, a vector, or one of NONE, ALL"),
        ],
    )
    def test_what_is_no_block_is_refused_in_words(self, pair: Pair, blocks: str, said: str) -> None:
        with pytest.raises(SettingsError, match=f"^style_blocks: .*{said}"):
            pair.plan(Settings(style_blocks=blocks))


def test_plans_with_windows_and_blocks_are_kept_apart(pair: Pair) -> None:
    plain = pair.plan(Settings())
    assert pair.plan(Settings(style_from=0.5)) is not plain
    assert dataclasses.replace(Settings(), style_from=0.5).changed() == {"style_from": 0.5}
