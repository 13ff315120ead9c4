"""Policies that follow from τ, a module's name or its scores: Direct, Switch, B-LoRA, EST; and where policies run."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klora.errors import SettingsError
from klora.fusion.plan import FileModule, FusionPlan, make_plan
from klora.fusion.policies import POLICIES, is_heeded, make_policy, resolve
from klora.fusion.policies.base import BOTH, NEITHER, STYLE, SUBJECT, Active, Moment
from klora.fusion.policies.cm_lora import CmLora
from klora.fusion.scores import ModuleScore
from klora.settings import Settings, options

MODULES = [f"up_blocks.{i}.attentions.{j}.transformer_blocks.0.attn1.to_q" for i in (0, 1) for j in (0, 1, 2)]
taus = st.floats(0, 1)
strengths = st.floats(0.01, 100)


def score(size: float) -> ModuleScore:
    return ModuleScore((8, 8), 4, 4.0, size, size * size, {16: size})


def file_module(name: str, subject: float | None = 1.0, style: float | None = 1.0) -> FileModule:
    return FileModule(
        name,
        None,
        in_scope=True,
        subject_name=None if subject is None else "c",
        style_name=None if style is None else "s",
        subject=None if subject is None else score(subject),
        style=None if style is None else score(style),
    )


def plan_of(*modules: FileModule, **settings: object) -> FusionPlan:
    return make_plan(modules, resolve(Settings.parse(settings), "SDXL"))


@pytest.mark.parametrize(("preset", "weights"), [("1,1", (1, 1)), ("0.5,0.5", (0.5, 0.5)), ("1/3,2/3", (1 / 3, 2 / 3))])
def test_direct_weighs_every_module_by_its_preset(preset: str, weights: tuple[float, float]) -> None:
    plan = plan_of(
        file_module("a"), file_module("b", style=None), file_module("c", None), policy="direct", preset=preset
    )
    assert plan.decide("a", 0.3) == weights
    assert plan.decide("b", 0.3) == (weights[0], 0)
    assert plan.decide("c", 0.3) == (0, weights[1])


@given(st.integers(1, 12), st.integers(1, 60))
def test_switch_gives_each_lora_its_steps_in_turn_beginning_with_the_subject(period: int, steps: int) -> None:
    plan = plan_of(file_module("a"), file_module("b"), policy="switch", period=period, steps=steps)
    expected = "".join("cs"[i // period % 2] for i in range(steps))
    assert set(plan.selections.values()) == {expected}


@given(st.integers(1, 12), st.integers(1, 60))
def test_switch_counts_steps_by_noise_level(period: int, steps: int) -> None:
    plan = plan_of(file_module("a"), policy="switch", period=period, steps=steps)
    for i in range(steps):
        for tau in (i / steps, (i + 0.5) / steps):
            assert plan.decide("a", tau).letter == "cs"[i // period % 2]


def test_switch_switches_modules_of_one_file_too() -> None:
    plan = plan_of(file_module("a", style=None), file_module("b", None), policy="switch", period=2, steps=6)
    assert plan.selections == {"a": "cc--cc", "b": "--ss--"}
    assert set(plan_of(file_module("a", style=None), policy="switch", unpaired="drop").selections["a"]) == {"-"}


@given(taus)
def test_b_lora_is_two_blocks_and_nothing_else(tau: float) -> None:
    plan = plan_of(*(file_module(name) for name in MODULES), file_module("x", style=None), policy="b-lora")
    decided = [plan.decide(name, tau) for name in [*MODULES, "x"]]
    assert decided == [SUBJECT, STYLE, NEITHER, NEITHER, NEITHER, NEITHER, NEITHER]
    assert not plan.warnings


def test_b_lora_filters_files_that_hold_their_own_block_only() -> None:
    files = [file_module(MODULES[0], style=None), file_module(MODULES[1], None), file_module(MODULES[2], None)]
    plan = plan_of(*files, policy="b-lora", steps=1)
    assert list(plan.selections.values()) == ["c", "s", "-"]
    # The subject's block of a style file is no concern of B-LoRA's.
    assert plan_of(file_module(MODULES[0], None), policy="b-lora", steps=1).selections[MODULES[0]] == "-"


def test_b_lora_says_what_it_lacks() -> None:
    plan = plan_of(file_module(MODULES[0]), policy="b-lora")
    assert any("style" in warning and "up_blocks.0.attentions.1" in warning for warning in plan.warnings)
    with pytest.raises(SettingsError, match="SDXL"):
        plan.policy.check_model(["down_blocks.0.attentions.0.proj_in"])
    plan.policy.check_model(MODULES)


def test_b_lora_leaves_the_text_encoder_out_unless_asked() -> None:
    assert resolve(Settings(policy="b-lora"), "SDXL").text_encoder == "none"
    assert resolve(Settings(policy="b-lora", text_encoder="both"), "SDXL").text_encoder == "both"


sizes = st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=6)


@given(sizes, st.integers(-8, 8), st.integers(-8, 8))
def test_est_with_the_square_of_gamma_does_not_see_the_scale_of_a_file(sizes: list, c: int, s: int) -> None:
    # Powers of two, so that scaling is exact.
    plain = plan_of(*(file_module(f"m{i}", a, b) for i, (a, b) in enumerate(sizes)), policy="est", gamma_power=2)
    scaled = plan_of(
        *(file_module(f"m{i}", a * 2.0**c, b * 2.0**s) for i, (a, b) in enumerate(sizes)), policy="est", gamma_power=2
    )
    for here, there in zip(plain.modules, scaled.modules, strict=True):
        assert here.rho == pytest.approx(there.rho, rel=1e-9)


def test_est_compares_squared_norms() -> None:
    plan = plan_of(file_module("a", 3.0, 2.0), file_module("b", 1.0, 2.0), policy="est")
    assert (plan.by_name["a"].subject_sum, plan.by_name["a"].style_sum) == (9.0, 4.0)
    assert plan.gamma == 1.0
    assert plan.by_name["a"].rho == 2.25
    assert plan_of(file_module("a", 3.0, 2.0), policy="est", gamma_power=2).gamma == 2.25
    assert plan_of(file_module("a", 3.0, 0.0), policy="est", gamma_power=2).gamma is None
    assert [plan_of(file_module("a", 3.0, 2.0), policy="est", gamma=3, gamma_power=p).gamma for p in (0, 1, 2)] == [
        1,
        3,
        9,
    ]


@given(sizes, st.floats(-1, 1), st.floats(0, 3), st.integers(1, 12))
def test_est_is_energy_against_alpha_tau_plus_one_minus_discrepancy(
    sizes: list, d: float, alpha: float, steps: int
) -> None:
    plan = plan_of(
        *(file_module(f"m{i}", a, b) for i, (a, b) in enumerate(sizes)),
        policy="est",
        discrepancy=d,
        alpha=alpha,
        beta=7,
        steps=steps,
    )
    assert plan.gamma == 1.0
    for i, (subject, style) in enumerate(sizes):
        for step in range(steps):
            threshold = (alpha * (step / steps) + 1 - d) * style**2
            if abs(subject**2 - threshold) > 1e-9 * threshold:
                assert (plan.selection(f"m{i}")[step] == "c") == (subject**2 > threshold)


def test_est_takes_the_gamma_of_the_authors_program_where_it_is_wanted() -> None:
    plan = plan_of(file_module("a", 3.0, 2.0), policy="est", gamma_power=1, variant="official")
    assert plan.gamma == 1.5


@given(st.integers(1, 40), st.integers(1, 10))
def test_the_predictions_of_composite_and_cm_lora_are_means(steps: int, period: int) -> None:
    for policy in ("composite", "cm-lora"):
        rule = make_policy(resolve(Settings(policy=policy, period=period), None))
        for i in range(steps):
            forwards = rule.predictions(Moment(i / steps, steps, 0.0))
            assert len(forwards) == rule.forwards
            assert math.fsum(forward.weight for forward in forwards) == pytest.approx(1.0)
            assert sorted(forward.active for forward in forwards) == [STYLE, SUBJECT]


def test_dominance_goes_round() -> None:
    rule = CmLora(resolve(Settings(policy="cm-lora", period=2, refresh=4), None))
    leads = [rule.predictions(Moment(i / 8, 8, 0.0))[0] for i in range(8)]
    assert "".join(lead.active.letter for lead in leads) == "ccssccss"
    # n = 2, d = 1.5: d·n/(d+n−1) = 1.2 and n/(d+n−1) = 0.8, of n.
    assert [forward.weight for forward in rule.predictions(Moment(0, 8, 0.0))] == pytest.approx([0.6, 0.4])
    assert [forward.reuse for forward in rule.predictions(Moment(0, 8, 0.0))] == [1, 4]


def test_score_level_policies_take_two_forwards() -> None:
    assert {name for name, policy in POLICIES.items() if policy.forwards == 2} == {"composite", "cm-lora"}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_every_policy_has_a_title_and_heeds_settings_that_exist(policy: type) -> None:
    assert policy.title
    assert policy.own_settings | policy.defaults.keys() <= options().keys()
    assert all(is_heeded(name, policy.name) for name in policy.own_settings)


def test_a_setting_of_one_policy_s_own_is_heeded_by_no_other() -> None:
    assert is_heeded("seed", "random")
    assert not is_heeded("seed", "k-lora")
    assert not is_heeded("balance", "direct")
    assert is_heeded("share", "fixed")
    assert is_heeded("scope", "random")


def test_balance_and_share_are_for_policies_with_a_scale() -> None:
    heeding = {name for name in POLICIES if is_heeded("balance", name)}
    assert heeding == {"k-lora", "est", "fixed", "top-k", "no-gamma"}
    assert heeding == {name for name in POLICIES if is_heeded("share", name)}


@given(st.sampled_from(sorted(POLICIES)), taus, st.integers(1, 40))
def test_a_policy_only_depends_on_what_it_is_told(policy: str, tau: float, steps: int) -> None:
    plan = plan_of(file_module("a", 2.0, 1.0), policy=policy, steps=steps)
    assert plan.decide("a", tau) == dataclasses.replace(plan).decide("a", tau)
    assert isinstance(plan.decide("a", tau), Active)
    assert BOTH.times(plan.decide("a", tau)) == plan.decide("a", tau)
