"""The plan: who acts where and when, from scores alone."""

import dataclasses
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from klora.errors import SettingsError
from klora.fusion.gamma import global_gamma, trimmed_gamma
from klora.fusion.plan import FileModule, FusionPlan, balance_for_share, make_plan
from klora.fusion.policies import POLICIES, make_policy, resolve
from klora.fusion.policies.base import ScaledPolicy
from klora.fusion.scale import Scale
from klora.fusion.scores import ModuleScore
from klora.settings import Settings

K = 16


def score(top: float, l1: float | None = None) -> ModuleScore:
    return ModuleScore((8, 8), 4, 4.0, top if l1 is None else l1, 0.0, {K: top})


def file_module(
    name: str, subject: float | None, style: float | None, in_scope: bool = True, **l1: float
) -> FileModule:
    return FileModule(
        name,
        None,
        in_scope,
        None if subject is None else f"lora_{name}",
        None if style is None else f"lora_{name}",
        None if subject is None else score(subject, l1.get("subject_l1")),
        None if style is None else score(style, l1.get("style_l1")),
    )


def plan_of(sums: list[tuple[float, float]], architecture: str | None = "SDXL", **settings: object) -> FusionPlan:
    modules = [file_module(f"m{i}", *pair) for i, pair in enumerate(sums)]
    return make_plan(modules, resolve(Settings.parse(settings), architecture))


def test_a_trimmed_gamma_of_nothing_is_unknown() -> None:
    assert trimmed_gamma([], []) is None
    assert trimmed_gamma([1], [0]) is None
    assert trimmed_gamma([0], [1]) is None


positive = st.floats(0.01, 100)
sums = st.lists(st.tuples(positive, positive), min_size=1, max_size=12)


def test_a_module_goes_to_the_subject_while_its_ratio_reaches_the_scale() -> None:
    # γ = (2 + 1 + 1) / (1 + 2 + 1) = 1, so ρ = 2, 0.5, 1; S runs 0.5, 0.875, 1.25, 1.625.
    plan = plan_of([(2, 1), (1, 2), (1, 1)], steps=4)
    assert plan.gamma == 1.0
    assert [module.rho for module in plan.modules] == [2.0, 0.5, 1.0]
    assert [plan.selection(module.name) for module in plan.modules] == ["cccc", "csss", "ccss"]
    assert plan.subject_share() == [1.0, 2 / 3, 1 / 3, 1 / 3]
    assert plan.share == pytest.approx((1 + 2 / 3 + 1 / 3 + 1 / 3) / 4)


def test_k_is_the_product_of_the_ranks_or_the_k_asked_for_and_never_more_than_the_entries() -> None:
    plan = plan_of([(1, 1)])
    assert plan.modules[0].k == 4 * 4
    big = ModuleScore((2, 2), 4, 4.0, 1.0, 0.0, {})
    modules = [FileModule("m", None, True, "a", "b", big, big)]
    assert make_plan(modules, Settings().resolve(None)).modules[0].k == 4
    assert make_plan(modules, Settings(k=3000).resolve(None)).modules[0].k == 4


@given(sums, st.sampled_from(["s", "s*"]), st.sampled_from(["paper", "official"]), st.integers(-8, 8))
def test_scaling_a_whole_file_changes_no_decision(pairs: list, scale: str, variant: str, power: int) -> None:
    # Powers of two are exact in floating point, so even ties stay ties.
    factor = 2.0**power
    settings = {"scale": scale, "variant": variant, "steps": 20, "scope": "all"}
    plain = plan_of(pairs, **settings)
    assert plan_of([(c * factor, s) for c, s in pairs], **settings).selections == plain.selections
    assert plan_of([(c, s * factor) for c, s in pairs], **settings).selections == plain.selections


@given(sums, st.sampled_from(["s", "s*"]), st.sampled_from(["paper", "official"]), st.integers(1, 60), st.floats(-2, 2))
def test_a_selection_is_what_is_decided_at_each_step(
    pairs: list, scale: str, variant: str, steps: int, balance: float
) -> None:
    plan = plan_of(pairs, scale=scale, variant=variant, scope="all", steps=steps, balance=balance)
    for module in plan.modules:
        step_by_step = "".join(plan.decide(module.name, i / steps).letter for i in range(steps))
        assert plan.selection(module.name) == step_by_step


def test_a_selection_of_many_steps_takes_few_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, asked, decide = plan_of([(2, 1), (1, 2), (1, 1)], steps=1000), [], ScaledPolicy.decide
    monkeypatch.setattr(ScaledPolicy, "decide", lambda *args: asked.append(args) or decide(*args))
    assert all(set(plan.selection(f"m{i}")) <= set("cs") for i in range(3))
    assert len(asked) < 3 * 30


@pytest.mark.parametrize("scale", ["s", "s*"])
@pytest.mark.parametrize("policy", ["k-lora", "est"])
def test_a_policy_compares_with_the_scale_that_is_set(policy: str, scale: str) -> None:
    settings = resolve(Settings.parse({"policy": policy, "scale": scale, "alpha": 2, "beta": 0.25}), None)
    beta = 0.25 if policy == "k-lora" else 1 - settings.discrepancy
    assert make_policy(settings).scale == Scale(scale, 2.0, beta)


@pytest.mark.parametrize("settings", [{"alpha": 1.0}, {"beta": 1.0}, {}])
def test_settings_are_resolved_before_a_policy_is_made(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="resolved"):
        POLICIES["k-lora"](Settings(**settings))


@pytest.mark.parametrize(("variant", "letter"), [("paper", "c"), ("official", "s")])
def test_a_tie_of_ratio_and_scale_goes_to_the_side_of_the_variant(variant: str, letter: str) -> None:
    assert plan_of([(1, 1)], variant=variant, scale="s", alpha=0, beta=1, steps=2).selection("m0") == 2 * letter


@given(sums)
def test_swapping_the_roles_mirrors_the_plan(pairs: list) -> None:
    plan = plan_of(pairs, steps=7)
    mirrored = plan_of([(s, c) for c, s in pairs], steps=7)
    assert mirrored.gamma == pytest.approx(1 / plan.gamma)
    for here, there in zip(plan.modules, mirrored.modules, strict=True):
        assert there.rho == pytest.approx(1 / here.rho)
    # Without a scale the decisions themselves are mirrored, ties apart.
    plan, mirrored = (plan_of(p, policy="top-k", steps=3) for p in (pairs, [(s, c) for c, s in pairs]))
    for (name, here), (c, s) in zip(plan.selections.items(), pairs, strict=True):
        assert here == "ccc" if c >= s else here == "sss"
        assert mirrored.selections[name] == ("ccc" if s >= c else "sss")


@given(sums)
def test_without_slope_beta_alone_decides(pairs: list) -> None:
    assert set("".join(plan_of(pairs, alpha=0, beta=0, scale="s").selections.values())) == {"c"}
    assert set("".join(plan_of(pairs, alpha=0, beta=1e9, scale="s").selections.values())) == {"s"}


@given(sums, st.sampled_from(["s", "s*"]), st.sampled_from(["paper", "official"]), st.integers(1, 60))
def test_every_policy_gives_one_known_letter_per_step(pairs: list, scale: str, variant: str, steps: int) -> None:
    for policy in POLICIES:
        plan = plan_of(pairs, policy=policy, scale=scale, variant=variant, steps=steps)
        for module in plan.modules:
            selection = plan.selection(module.name)
            assert len(selection) == steps
            assert set(selection) <= set("csb-")


def test_gamma_is_the_ratio_of_global_sums_and_officially_a_trimmed_mean() -> None:
    sums = [1, 2, 3, 100, 1, 1], [1, 1, 1, 1, 1, 1]
    assert global_gamma(*sums) == pytest.approx(108 / 6)
    # The mean is 18; 100 is at least 3 × 18 and dropped; the mean of the others is 8/5.
    assert trimmed_gamma(*sums) == pytest.approx(8 / 5)


@pytest.mark.parametrize(("variant", "gamma"), [("paper", 18), ("official", 8 / 5)])
def test_gamma_is_that_of_the_variant(variant: str, gamma: float) -> None:
    pairs = [(1, 1), (2, 1), (3, 1), (100, 1), (1, 1), (1, 1)]
    assert plan_of(pairs, variant=variant).gamma == pytest.approx(gamma)


def test_a_ratio_of_exactly_three_times_the_mean_is_trimmed() -> None:
    assert trimmed_gamma([1, 1, 1, 9], [1, 1, 1, 1]) == 1.0


def test_gamma_looks_only_at_contested_modules_in_scope() -> None:
    modules = [
        file_module("a", 2, 1),
        file_module("b", 50, None),
        file_module("c", None, 70),
        dataclasses.replace(file_module("d", 30, 1, in_scope=False)),
    ]
    assert make_plan(modules, Settings().resolve(None)).gamma == 2.0


def test_modules_that_are_not_contested_have_fixed_roles() -> None:
    modules = [
        file_module("a", 1, 1),
        file_module("b", 1, None),
        file_module("c", None, 1),
        file_module("d", 1, 1, in_scope=False),
    ]

    def letters(**settings: object) -> str:
        plan = make_plan(modules, Settings.parse({"steps": 1, **settings}).resolve(None))
        return "".join(plan.selection(name) for name in "bcd")

    assert letters() == "csb"
    assert letters(unpaired="drop") == "--b"
    assert letters(other_layers="style") == "css"
    assert letters(variant="official") == "cs-"


def test_a_module_where_only_one_side_is_zero_goes_to_the_other() -> None:
    plan = plan_of([(1, 0), (0, 1), (0, 0), (1, 1)], steps=5)
    assert [plan.selection(f"m{i}") for i in range(3)] == ["ccccc", "sssss", "-----"]
    assert plan.by_name["m0"].rho == math.inf
    assert plan.by_name["m2"].rho is None


@pytest.mark.parametrize(
    ("pairs", "letter", "zero"),
    [
        ([(1, 0), (2, 0)], "c", ["style"]),
        ([(0, 1), (0, 2)], "s", ["subject"]),
        ([(0, 0)], "-", ["both LoRAs"]),
    ],
)
@pytest.mark.parametrize("policy", ["k-lora", "no-gamma", "top-k", "fixed"])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_a_side_that_is_zero_everywhere_leaves_gamma_undefined_with_a_warning_that_names_it(
    pairs: list, letter: str, zero: list[str], policy: str, variant: str
) -> None:
    plan = plan_of(pairs, policy=policy, variant=variant, steps=3)
    assert plan.gamma is None
    assert set("".join(plan.selections.values())) == {letter}
    (warning,) = plan.warnings
    assert [side for side in ("subject", "style", "both LoRAs") if side in warning] == zero


@pytest.mark.parametrize("gamma", [None, 2.0])
def test_where_the_trimmed_mean_is_zero_what_is_not_zero_acts(gamma: float | None) -> None:
    # Trainers write zeros for blocks that they left alone; what is left is dropped as 3 × the mean or more.
    plan = plan_of([(0, 1)] * 6 + [(5, 1), (0, 0)], variant="official", scope="all", gamma=gamma, steps=2)
    assert plan.gamma == gamma
    assert list(plan.selections.values()) == ["ss"] * 6 + ["cc", "--"]
    assert [warning for warning in plan.warnings if "the subject LoRA is zero on most" in warning] == (
        [] if gamma else [*plan.warnings]
    )


def test_a_policy_is_told_which_modules_each_file_has() -> None:
    mine, yours = "up_blocks.0.attentions.0.to_q", "up_blocks.0.attentions.1.to_q"
    for pairs, warnings in (({mine: (1, None), yours: (None, 1)}, 0), ({mine: (None, 1), yours: (1, None)}, 2)):
        modules = [file_module(name, *pair) for name, pair in {**pairs, "mid_block.to_q": (1, 1)}.items()]
        assert len(make_plan(modules, resolve(Settings(policy="b-lora"), "SDXL")).warnings) == warnings


def test_a_module_keeps_its_slice_and_what_either_file_calls_it() -> None:
    fused = dataclasses.replace(file_module("a", 1, 2), slice="q", style_name="another")
    plan = make_plan([fused, file_module("b", 1, None), file_module("c", None, 1)], Settings().resolve(None))
    assert [(module.name, module.slice, module.subject_name, module.style_name) for module in plan.modules] == [
        ("a", "q", "lora_a", "another"),
        ("b", None, "lora_b", None),
        ("c", None, None, "lora_c"),
    ]


def test_nothing_contested_is_a_warning() -> None:
    plan = make_plan([file_module("a", 1, None), file_module("b", None, 1)], Settings().resolve(None))
    assert plan.gamma is None
    assert plan.share is None
    assert plan.subject_share() == [None] * 30
    assert "nothing is selected" in plan.warnings[0]


@given(sums, st.floats(-2, 2), st.floats(-2, 2))
def test_more_balance_never_gives_the_subject_more(pairs: list, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert plan_of(pairs, balance=low).share >= plan_of(pairs, balance=high).share


@given(sums, st.floats(0, 1), st.sampled_from(["s", "s*"]), st.integers(1, 30))
@example([(1.0, 1.0), (1.25, 3.0), (1.25, 1.25)], 0.5, "s", 4)  # the first and last differ in their last bit
def test_a_share_target_takes_the_nearest_reachable_share(pairs: list, share: float, scale: str, steps: int) -> None:
    plan = plan_of(pairs, share=share, scale=scale, steps=steps)
    ratios = [
        m.rho / s if (s := plan.policy.scale(i / steps)) else math.inf for m in plan.modules for i in range(steps)
    ]
    reachable = {
        # No balance tells ratios apart that differ by rounding alone.
        sum(ratio >= threshold * (1 - 1e-12) for ratio in ratios) / len(ratios)
        for threshold in [*ratios, 2 * max([r for r in ratios if r < math.inf], default=1), 1e-9]
        if 0 < threshold < math.inf
    }
    assert abs(plan.share - share) <= min(abs(r - share) for r in reachable) + 1e-9


@pytest.mark.parametrize(
    ("ratios", "share", "balance"),
    # Of shares that are equally near, that of the smaller change: 0 and 1/2 are, then 1/2 and 1, on either side of 0.
    [((2.0, 0.5), 0.25, 0.0), ((2.0, 0.5), 0.75, 0.0), ((8.0, 4.0), 0.75, 1.0), ((1 / 8, 1 / 4), 0.25, -1.0)],
)
def test_of_shares_equally_near_the_balance_nearest_to_0_is_taken(
    ratios: tuple[float, ...], share: float, balance: float
) -> None:
    assert balance_for_share(ratios, [1.0], share) == balance


@pytest.mark.parametrize(
    ("ratios", "share", "balance"),
    [
        ((0.0, 0.0, 1.0), 1 / 3, -1.0),
        ((0.0, 0.0, 1.0), 1.0, -1.0),
        ((math.inf, 1.0), 0.5, 1.0),
        ((0.0, math.inf), 1.0, 0.0),
    ],
)
def test_where_one_lora_does_nothing_at_all_no_balance_changes_the_choice(
    ratios: tuple[float, ...], share: float, balance: float
) -> None:
    assert balance_for_share(ratios, [1.0], share) == balance


def test_a_share_target_is_met_for_the_number_of_steps_sampled() -> None:
    plan = plan_of([(i, 10 - i) for i in range(1, 10)], share=0.5, steps=10)
    assert plan.share == pytest.approx(0.5, abs=0.02)
    assert plan.with_steps(37).share == pytest.approx(0.5, abs=0.02)


def test_fixed_selection_is_the_subject_until_the_scale_passes_one() -> None:
    plan = plan_of([(1, 100), (100, 1)], policy="fixed", steps=6)
    # S = 0.5 + 1.5·i/6 = 0.5, 0.75, 1, 1.25 …
    assert plan.selections == {"m0": "cccsss", "m1": "cccsss"}


def test_top_k_only_and_no_gamma_are_the_ablations_of_the_paper() -> None:
    pairs = [(1.0, 100.0), (3.0, 2.0)]
    assert plan_of(pairs, policy="top-k", steps=3).selections == {"m0": "sss", "m1": "ccc"}
    no_gamma = plan_of(pairs, policy="no-gamma", steps=3)
    assert no_gamma.gamma == 1.0
    assert no_gamma.by_name["m1"].rho == 1.5
    assert no_gamma.selection("m1") == "ccc"


def test_random_selection_is_reproducible_and_a_third_subject() -> None:
    pairs = [(1.0, 1.0)] * 100
    plan = plan_of(pairs, policy="random", steps=49)
    assert plan.selections == plan_of(pairs, policy="random", steps=49).selections
    assert plan.selections != plan_of(pairs, policy="random", steps=49, seed=1).selections
    assert plan.share == pytest.approx(1 / 3, abs=0.03)
    # Within a step nothing changes: the draw is for floor(τ·N).
    for i in range(49):
        assert plan.decide("m0", i / 49) == plan.decide("m0", (i + 0.5) / 49)


def test_random_selection_takes_no_share_target() -> None:
    with pytest.raises(SettingsError, match="share"):
        plan_of([(1, 1)], policy="random", share=0.5)


def test_an_unknown_policy_is_refused_with_the_known_names() -> None:
    with pytest.raises(SettingsError, match="k-lora"):
        plan_of([(1, 1)], policy="magic")


def test_gamma_can_be_given() -> None:
    plan = plan_of([(2, 1), (2, 1)], gamma=4.0)
    assert plan.gamma == 4.0
    assert plan.modules[0].rho == 0.5


@pytest.mark.parametrize(("policy", "gamma"), [("no-gamma", 1.0), ("top-k", 1.0), ("fixed", 4.0)])
def test_a_policy_without_gamma_takes_none_that_is_given(policy: str, gamma: float) -> None:
    assert plan_of([(2, 1), (2, 1)], policy=policy, gamma=4.0).gamma == gamma


@pytest.mark.parametrize(
    ("ratios", "scales", "share", "balance"),
    [
        # Nothing that a balance could move: all or nothing at every step.
        ((math.inf,), [1.0], 0.5, 0.0),
        ((0.0,), [1.0], 0.5, 0.0),
        ((1.0,), [0.0], 0.5, 0.0),
        # Of one that always wins, one that never does and one that can be moved, only the last moves.
        ((math.inf, 1.0, 0.0), [1.0], 0.0, 1.0),
        ((math.inf, 1.0, 0.0), [1.0], 1.0, -1.0),
        ((4.0, math.inf, 0.0), [1.0], 0.4, 3.0),
    ],
)
def test_what_no_balance_can_move_is_left_out_of_the_search(
    ratios: tuple[float, ...], scales: list[float], share: float, balance: float
) -> None:
    assert balance_for_share(ratios, scales, share) == balance


def test_the_same_number_of_steps_is_the_same_plan_and_another_forgets_what_was_seen() -> None:
    plan = dataclasses.replace(plan_of([(1, 2)], steps=4), record={"m0": "cccc"})
    assert plan.with_steps(4) is plan
    assert plan.with_steps(5).record is None


@pytest.mark.parametrize(("scale", "share"), [("s", "100%"), ("s*", "0%")])
def test_what_one_step_means_is_said(scale: str, share: str) -> None:
    plan = plan_of([(1.0, 1.0)], scale=scale, steps=1)
    assert plan.of_one_step is not None
    assert f"the subject has {share} of all choices" in plan.of_one_step
    assert plan.of_one_step in plan.notices
    assert plan.with_steps(2).of_one_step is None
    assert plan_of([(1.0, 1.0)], policy="direct", steps=1).of_one_step is None
