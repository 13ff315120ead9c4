"""Merges of single entries and of singular vectors: TIES, DARE, magnitude pruning, KnOTS, and the cut to a rank."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klora.errors import MismatchError
from klora.fusion.cut import cut
from klora.fusion.entries import Drawn, EntryMerge, Largest, _around, cut_merge, elected_mean, largest
from klora.fusion.plan import FileModule, make_plan
from klora.fusion.policies import POLICIES, make_policy, resolve
from klora.fusion.policies.base import BOTH, Active, Moment
from klora.fusion.policies.knots.basis import shared_basis, tie
from klora.fusion.scores import ModuleScore
from klora.lora.deltas.computed import FactorDelta
from klora.settings import Settings
from tests.fusion.policies.test_static import (
    CONV,
    LIKE,
    NAME,
    TALL,
    close,
    combined,
    delta_of,
    file_delta,
    ranks,
    seeds,
)
from tests.support.lora_files import FAMILIES

MERGES = ("ties", "dare", "magnitude-prune", "knots")
LONG = FactorDelta("f.safetensors", "k", 1, 1.0, 1.0, (150, 9), torch.zeros(150, 1), torch.zeros(1, 9))

ALL = Largest((0.0, 0.0))


def of_matrix(W: torch.Tensor) -> FactorDelta:
    """A delta that is this matrix."""
    return FactorDelta.like(LIKE if W.shape == LIKE.shape else LONG, W, torch.eye(W.shape[1]), 1.0)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seeds, st.sampled_from(["ties", "magnitude-prune"]))
def test_where_supports_are_disjoint_a_merge_is_the_sum(seed: int, policy: str) -> None:
    values, first = random(seed, 12, 16), random(seed + 1, 12, 16) > 0
    subject, style = of_matrix(values * first), of_matrix(values * ~first)
    made = combined(policy, subject, style, density=1, merge_rank=0)[0]
    assert close(made.matrix(), values)


def test_ties_by_hand() -> None:
    values = torch.tensor([[4.0, -3.0, 1.0, 0.0, 2.0], [2.0, 1.0, -2.0, 0.0, -2.0]])
    assert elected_mean(values).tolist() == [3.0, -3.0, -2.0, 0.0, 0.0]


@given(seeds, st.floats(0.01, 1))
def test_trimming_keeps_the_fraction_of_largest_entries(seed: int, density: float) -> None:
    values = random(seed, 12, 16)
    kept = values.abs() >= largest(values, density)
    assert int(kept.sum()) == max(1, round(density * values.numel()))
    assert (not kept.all() and values[kept].abs().min() >= values[~kept].abs().max()) or kept.all()


@pytest.mark.parametrize("shape", [(400, 400), (1, 200_000)])
@pytest.mark.parametrize("density", [1e-6, 0.01, 0.2, 0.5, 0.999, 1])
def test_the_quantile_of_many_entries_is_exact(shape: tuple[int, ...], density: float) -> None:
    # Sorted, and with many equal ones: what a strided sample tells least about.
    for values in (random(1, *shape), random(2, *shape).flatten().sort().values, random(3, *shape).round()):
        ordered = values.abs().flatten().sort(descending=True).values
        assert largest(values, density) == ordered[max(1, round(density * values.numel())) - 1]


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.999])
def test_the_quantile_of_many_entries_is_sought_among_few(density: float) -> None:
    magnitudes = random(4, 400_000).abs()
    keep = round(density * len(magnitudes))
    low, high = _around(magnitudes, keep)
    assert low <= largest(magnitudes, density) <= high
    assert ((magnitudes >= low) & (magnitudes <= high)).float().mean() < 0.05


@given(seeds, st.floats(0.05, 1), st.floats(-2, 2), st.floats(-2, 2))
def test_ties_is_what_its_paper_says_for_every_entry(seed: int, density: float, s_c: float, s_s: float) -> None:
    subject, style = delta_of(3, seed), delta_of(4, seed + 1)
    settings = {"density": density, "merge_rank": 0, "subject_strength": s_c, "style_strength": s_s}
    made = combined("ties", subject, style, **settings)[0].matrix()
    trimmed = [
        strength * W * (W.abs() >= largest(W, density))
        for W, strength in ((subject.matrix(), s_c), (style.matrix(), s_s))
    ]
    for i in range(12):
        for j in range(16):
            pair = [float(W[i, j]) for W in trimmed]
            agree = [x for x in pair if x * sum(pair) > 0]
            assert float(made[i, j]) == pytest.approx(sum(agree) / len(agree) if agree else 0.0, abs=1e-6)


@given(ranks, ranks, seeds)
def test_dare_and_pruning_that_keep_everything_are_the_direct_merge(r_c: int, r_s: int, seed: int) -> None:
    subject, style = delta_of(r_c, seed, 0.5), delta_of(r_s, seed + 1)
    for policy in ("dare", "magnitude-prune"):
        made = combined(policy, subject, style, density=1, subject_strength=2, style_strength=-1)[0]
        # Cut to the sum of both ranks, which the sum does not exceed: exact.
        assert made.rank <= r_c + r_s
        assert close(made.matrix(), 2 * subject.matrix() - style.matrix())


@pytest.mark.parametrize("policy", [*MERGES, "lego"])
@pytest.mark.parametrize("style", ["zero", "some"])
def test_a_merge_has_the_multipliers_of_a_block_in_it_once(policy: str, style: str) -> None:
    score, zero = ModuleScore((12, 16), 1, 1.0, 2.0, 4.0, {1: 2.0}), ModuleScore((12, 16), 1, 1.0, 0.0, 0.0, {1: 0.0})
    scores = score, score if style == "some" else zero
    module = FileModule(NAME, None, True, "c", "s", *scores, weights=Active(0.5, 0.5))
    plan = make_plan([module], resolve(Settings(policy=policy), None))
    assert set(plan.decide(NAME, 0.0)) <= {0.0, 1.0}


@pytest.mark.parametrize("density", [0.3, 0.7])
def test_the_mean_over_dares_draws_is_the_sum(density: float) -> None:
    subject, style = delta_of(2, 1), delta_of(3, 2)
    draws = torch.stack(
        [combined("dare", subject, style, density=density, merge_rank=0, seed=seed)[0].matrix() for seed in range(2000)]
    )
    total = subject.matrix() + style.matrix()
    # Each entry's variance is (1/p − 1)·(w_c² + w_s²); five standard errors.
    error = ((1 / density - 1) * (subject.matrix() ** 2 + style.matrix() ** 2) / len(draws)).sqrt()
    assert ((draws.mean(0) - total).abs() <= 5 * error + 1e-6).all()


@given(seeds, seeds, st.floats(0.1, 0.9))
def test_dare_drops_or_rescales_and_its_seed_tells_what(seed: int, draw: int, density: float) -> None:
    subject, zero = delta_of(3, seed), of_matrix(torch.zeros(12, 16))
    options = {"density": density, "merge_rank": 0}
    made = combined("dare", subject, zero, **options, seed=draw)[0].matrix()
    kept = made != 0
    assert torch.allclose(made[kept], subject.matrix()[kept] / density)
    assert torch.equal(made, combined("dare", subject, zero, **options, seed=draw)[0].matrix())
    assert not torch.equal(made, combined("dare", subject, zero, **options, seed=draw + 1)[0].matrix())
    policy = make_policy(resolve(Settings.parse({"policy": "dare", **options, "seed": draw}), None))
    assert not torch.equal(made, policy.combine("another module", subject, zero)[0].matrix())


def test_every_side_and_every_group_of_rows_has_draws_of_its_own_the_same_in_every_release() -> None:
    ones, kept = torch.ones(64, 40), Drawn("0:module", 0.5)
    draws = {(side, group): kept.thin(side, group, ones) / 2 for side in (0, 1) for group in (0, 1, 2)}
    alike = [float((a == b).float().mean()) for i, a in draws.items() for j, b in draws.items() if i < j]
    # Of 2,560 entries half agree by chance, a standard deviation being 1 %.
    assert max(abs(share - 0.5) for share in alike) < 0.06
    assert draws[0, 0][0, :16].tolist() == [0, 1, 1, 1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 0, 0, 1]
    one, none = of_matrix(torch.ones(150, 9)), of_matrix(torch.zeros(150, 9))
    rows = combined("dare", one, none, density=0.5, merge_rank=0)[0].matrix()
    assert not torch.equal(rows[:64], rows[64:128])


def test_dare_with_ties_elects_among_what_stays() -> None:
    delta = delta_of(3, 1)
    made = combined("dare", delta, delta, density=1, dare_merge="ties", merge_rank=0)[0]
    assert close(made.matrix(), delta.matrix())


@given(st.integers(0, 149), st.integers(1, 150), seeds, st.sampled_from(["ties", "dare", "magnitude-prune"]))
def test_rows_of_a_merge_are_the_same_alone_and_together(start: int, count: int, seed: int, policy: str) -> None:
    stop = min(150, start + count)
    made = combined(
        policy, of_matrix(random(seed, 150, 9)), of_matrix(random(seed + 1, 150, 9)), density=0.5, merge_rank=0
    )[0]
    assert torch.equal(made.rows(start, stop), made.matrix()[start:stop])
    assert torch.equal(made.part(start, stop).matrix(), made.matrix()[start:stop])


@given(ranks, seeds, st.floats(-2, 2).filter(lambda x: abs(x) > 0.01))
def test_ties_and_knots_of_a_lora_with_itself_are_that_lora(rank: int, seed: int, strength: float) -> None:
    delta = delta_of(rank, seed, 0.5)
    both = {"subject_strength": strength, "style_strength": strength}
    for policy in ("ties", "knots"):
        made, other = combined(policy, delta, delta, density=1, **both)
        assert other is None
        assert close(made.matrix(), strength * delta.matrix())
    # Of KnOTS: what both have is in the basis once.
    assert made.rank == rank


@pytest.mark.parametrize("family", ["full", "loha"])
@pytest.mark.parametrize("name", [NAME, CONV, TALL])
@pytest.mark.parametrize("strength", [1.5, -2.0])
def test_knots_of_a_file_without_two_factors_with_itself_is_that_file(
    tmp_path: Path, family: str, name: str, strength: float
) -> None:
    delta = file_delta(tmp_path, family, name)
    made = combined("knots", delta, delta, density=1, subject_strength=strength, style_strength=strength)[0]
    assert close(made.matrix(), strength * delta.matrix())


def test_two_factors_are_never_multiplied_out_for_knots_and_for_a_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, style = delta_of(2, 1, 0.5), delta_of(3, 2, 4.0)
    total = subject.matrix() + style.matrix()
    monkeypatch.setattr(FactorDelta, "_fill", lambda *_: pytest.fail("formed"))
    made, cuts = combined("knots", subject, style, density=1)[0], [cut(delta, 9) for delta in (subject, style)]
    monkeypatch.undo()
    assert made.rank == 5
    assert close(sum(part.delta.matrix() for part in cuts), total)


@pytest.mark.parametrize("policy", [*MERGES, "lego"])
@pytest.mark.parametrize("merge_rank", [None, 3])
def test_a_merge_takes_the_place_of_the_subject(policy: str, merge_rank: int | None) -> None:
    subject, style = delta_of(2, 1), dataclasses.replace(delta_of(4, 2), file="style.safetensors", key="other")
    made = combined(policy, subject, style, merge_rank=merge_rank)[0]
    assert (made.file, made.key, made.shape) == (subject.file, subject.key, subject.shape)


def test_a_merge_that_is_not_cut_has_the_subjects_rank_and_no_scale_of_its_own() -> None:
    subject, style = delta_of(2, 1, 0.5), dataclasses.replace(delta_of(4, 2), file="style.safetensors", key="other")
    made = combined("dare", subject, style, merge_rank=0)[0]
    assert (made.file, made.key, made.rank, made.alpha, made.scale) == (subject.file, subject.key, 2, 1.0, 1.0)


def test_every_delta_of_a_merge_has_a_strength() -> None:
    pair, one = (delta_of(1, 1), delta_of(1, 2)), cast(tuple[float, float], (1.0,))
    with pytest.raises(ValueError, match="zip"):
        tie(pair, one, 0.5)
    with pytest.raises(ValueError, match="zip"):
        cut_merge(pair, one, ALL, elect=False, rank=None)


def test_knots_of_nothing_is_nothing() -> None:
    zero = of_matrix(torch.zeros(12, 16))
    made = tie((zero, zero), (1.0, 1.0), 0.5)
    assert (made.rank, made.shape) == (1, (12, 16))
    assert not made.matrix().any()


@given(ranks, ranks, seeds, st.floats(0.1, 1))
def test_knots_is_ties_in_the_basis_of_the_concatenation(r_c: int, r_s: int, seed: int, density: float) -> None:
    subject, style = delta_of(r_c, seed), delta_of(r_s, seed + 1)
    made = combined("knots", subject, style, density=density)[0]
    assert made.rank <= r_c + r_s
    U, S, Vh = torch.linalg.svd(torch.cat([subject.matrix(), style.matrix()], dim=1).double(), full_matrices=False)
    there = 1e-6 * S[0] < S
    shares = (S[there, None] * Vh[there]).split(16, dim=1)
    trimmed = [share * (share.abs() >= largest(share, density) * (1 - 1e-9)) for share in shares]
    assert close(made.matrix(), (U[:, there] @ elected_mean(torch.stack(trimmed))).float())


@given(ranks, ranks, seeds)
def test_the_shared_basis_is_orthonormal_and_gives_both_back(r_c: int, r_s: int, seed: int) -> None:
    deltas = delta_of(r_c, seed), delta_of(r_s, seed + 1)
    U, shares = shared_basis([(delta.up, delta.down) for delta in deltas])
    assert close(U.T @ U, torch.eye(U.shape[1], dtype=torch.float64))
    for delta, share in zip(deltas, shares, strict=True):
        assert close((U @ share).float(), delta.matrix())


@pytest.mark.parametrize("policy", MERGES)
def test_beside_a_file_of_zeros_the_other_takes_its_own_place(policy: str) -> None:
    delta, zero = delta_of(2, 1), FactorDelta.like(LIKE, torch.zeros(12, 2), torch.ones(2, 16), 1.0)
    subject, style = combined(policy, delta, zero, density=1)
    assert close(subject.matrix(), delta.matrix())
    assert style is None
    subject, style = combined(policy, zero, delta, density=1)
    assert subject is None
    assert close(style.matrix(), delta.matrix())


@pytest.mark.parametrize("name", [NAME, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", MERGES)
def test_every_family_can_be_merged_or_is_named(tmp_path: Path, policy: str, family: str, name: str) -> None:
    subject, style = file_delta(tmp_path, family, name, seed=1), file_delta(tmp_path, "lora", name, seed=2)
    if "dora" in family:
        with pytest.raises(MismatchError, match="is a DoRA"):
            combined(policy, subject, style)
        return
    made = combined(policy, subject, style, density=1, style_strength=0, merge_rank=12)[0]
    assert made.shape == subject.shape
    assert close(made.matrix(), subject.matrix())


@pytest.mark.parametrize("policy", MERGES)
def test_a_merge_is_the_same_at_every_step_and_holds_the_strengths(policy: str) -> None:
    rule = make_policy(resolve(Settings(policy=policy), None))
    assert {rule.decide(NAME, 1.0, Moment(tau, 8, 0.0)) for tau in (0.0, 0.4, 1.0)} == {BOTH}
    assert POLICIES[policy].static
    assert POLICIES[policy].folds_strengths


@given(st.integers(1, 20), seeds)
def test_a_cut_is_the_nearest_of_its_rank_and_tells_what_was_lost(rank: int, seed: int) -> None:
    W = random(seed, 12, 16)
    made = cut(of_matrix(W), rank)
    S = torch.linalg.svdvals(W.double())
    assert made.delta.rank == min(rank, 12)
    assert made.energy == pytest.approx(float(W.double().square().sum()), rel=1e-5)
    assert made.lost_share == pytest.approx(float(S[rank:].square().sum() / S.square().sum()), abs=1e-5)
    assert float((W - made.delta.matrix()).square().sum()) == pytest.approx(made.lost, abs=1e-3)


@pytest.mark.parametrize(
    ("shape", "rank", "exactly"), [((100, 120), 10, 1e-9), ((256, 300), 10, 1e-9), ((300, 320), 140, 1e-5)]
)
def test_a_cut_is_the_nearest_where_the_weight_is_small_or_the_rank_large(
    shape: tuple[int, int], rank: int, exactly: float
) -> None:
    W = random(5, *shape)
    source = FactorDelta("f", "k", 1, 1.0, 1.0, shape, torch.zeros(shape[0], 1), torch.zeros(1, shape[1]))
    whole = EntryMerge(
        "f", "k", 1, 1.0, 1.0, shape, (FactorDelta.like(source, torch.eye(shape[0]), W, 1.0),), (1.0,), ALL, False
    )
    best = float(torch.linalg.svdvals(W.double())[rank:].square().sum())
    assert cut(whole, rank).lost == pytest.approx(best, rel=exactly)


def test_a_large_cut_is_all_but_the_nearest(tmp_path: Path) -> None:
    like = FactorDelta("f", "k", 1, 1.0, 1.0, (400, 300), torch.zeros(400, 1), torch.zeros(1, 300))
    subject = FactorDelta.like(like, random(1, 400, 8), random(2, 8, 300), 1.0)
    style = FactorDelta.like(like, random(3, 400, 8), random(4, 8, 300), 1.0)
    whole = combined("ties", subject, style, merge_rank=0)[0]
    made = cut(whole, 16)
    best = float(torch.linalg.svdvals(whole.matrix().double())[16:].square().sum())
    assert best <= made.lost <= 1.01 * best
    assert torch.equal(made.delta.matrix(), combined("ties", subject, style)[0].matrix())
