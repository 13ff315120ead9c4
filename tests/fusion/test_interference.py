"""How much two LoRAs are in each other's way, against the same of whole matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klora.fusion.interference import EPSILON, Interference, _bases, _whole_bases, interference, interferences, total
from klora.lora.deltas.computed import FactorDelta
from tests.fusion.policies.test_static import LIKE, delta_of, ranks, seeds


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(C: torch.Tensor, S: torch.Tensor) -> tuple[float, float, float, float, float]:
    """Cosine, overlaps and insides of whole matrices, by SVD."""
    C, S = C.double(), S.double()
    spaces = []
    for W in (C, S):
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        there = sigma > 1e-5 * sigma[0]
        spaces.append((U[:, there], Vh[there].T))
    (U_c, V_c), (U_s, V_s) = spaces
    least = min(U_c.shape[1], U_s.shape[1])

    def inside(W: torch.Tensor, U: torch.Tensor, V: torch.Tensor) -> float:
        return float((U @ U.T @ W @ V @ V.T).square().sum() / W.square().sum())

    return (
        float((C * S).sum() / (C.norm() * S.norm())),
        float((U_c.T @ U_s).square().sum() / least),
        float((V_c.T @ V_s).square().sum() / least),
        inside(C, U_s, V_s),
        inside(S, U_c, V_c),
    )


def values(found: Interference) -> tuple[float, ...]:
    return (found.cosine, *found.overlaps, *found.inside)


@given(ranks, ranks, seeds, st.floats(0.1, 10))
def test_factors_tell_what_whole_matrices_do(r_c: int, r_s: int, seed: int, scale: float) -> None:
    subject, style = delta_of(r_c, seed, scale), delta_of(r_s, seed + 1)
    found = interference(subject, style)
    assert values(found) == pytest.approx(reference(subject.matrix(), style.matrix()), abs=1e-4)
    assert found.subject_energy == pytest.approx(float(subject.matrix().square().sum()), rel=1e-4)


@given(ranks, seeds, st.floats(-4, 4).filter(lambda x: abs(x) > 0.01))
def test_a_lora_and_a_multiple_of_it_share_everything(rank: int, seed: int, factor: float) -> None:
    delta = delta_of(rank, seed)
    other = FactorDelta.like(LIKE, delta.up * factor, delta.down, 1.0)
    sign = 1.0 if factor > 0 else -1.0
    assert values(interference(delta, other)) == pytest.approx((sign, 1, 1, 1, 1), abs=1e-4)


def test_loras_in_orthogonal_spaces_share_nothing() -> None:
    up, down = torch.eye(12), torch.eye(16)
    subject = FactorDelta.like(LIKE, up[:, :3] * 2, down[:3], 1.0)
    style = FactorDelta.like(LIKE, up[:, 3:7], down[3:7] * 5, 1.0)
    assert values(interference(subject, style)) == (0, 0, 0, 0, 0)
    # The same outputs from other inputs: nothing inside, but outputs shared.
    turned = FactorDelta.like(LIKE, up[:, :3], down[8:11], 1.0)
    assert values(interference(subject, turned)) == pytest.approx((0, 1, 0, 0, 0))


@given(ranks, seeds)
def test_units_that_repeat_or_are_zero_add_no_space(rank: int, seed: int) -> None:
    subject, style = delta_of(rank, seed), delta_of(3, seed + 1)
    up = torch.cat([subject.up / 2, subject.up / 2, torch.zeros(12, 2)], dim=1)
    twice = FactorDelta.like(LIKE, up, torch.cat([subject.down, subject.down, random(seed, 2, 16)]), 1.0)
    assert values(interference(twice, style)) == pytest.approx(values(interference(subject, style)), abs=1e-4)


def test_a_lora_of_zeros_is_in_nobodys_way() -> None:
    zero = FactorDelta.like(LIKE, torch.zeros(12, 2), random(1, 2, 16), 1.0)
    assert values(interference(zero, delta_of(3, 1))) == (0, 0, 0, 0, 0)
    assert values(interference(zero, zero)) == (0, 0, 0, 0, 0)


@given(ranks, ranks, seeds)
def test_several_modules_are_one_of_blocks_on_a_diagonal_in_energy_and_angle(r_c: int, r_s: int, seed: int) -> None:
    pairs = [(delta_of(r_c, seed + i), delta_of(r_s, seed + i + 2)) for i in range(2)]
    found = total([interference(*pair) for pair in pairs])
    C, S = (torch.block_diag(*(pair[side].matrix() for pair in pairs)) for side in (0, 1))
    assert found.modules == 2
    assert found.cosine == pytest.approx(reference(C, S)[0], abs=1e-4)
    assert found.inside == pytest.approx(reference(C, S)[3:], abs=1e-4)


def spaces(up: torch.Tensor, down: torch.Tensor, to_out: torch.Tensor, to_in: torch.Tensor) -> torch.Tensor:
    """The projections onto both spaces, whatever the bases."""
    return torch.cat([(Q @ Q.t()).flatten() for Q in (up @ to_out, down.t() @ to_in)])


@given(ranks, seeds, st.floats(0, 3))
def test_cholesky_gives_the_spaces_that_singular_vectors_give_where_all_of_them_stay(
    rank: int, seed: int, spread: float
) -> None:
    up, down = random(seed, 12, rank).double(), random(seed + 1, rank, 16).double()
    up *= torch.logspace(0, -spread, rank)
    G, H = up.t() @ up, down @ down.t()
    found = _whole_bases(G, H)
    if found is not None:
        torch.testing.assert_close(spaces(up, down, *found), spaces(up, down, *_bases(G, H)), rtol=0, atol=1e-9)


def test_where_singular_values_are_to_go_cholesky_does_not_do() -> None:
    up, down = torch.eye(12)[:, :3].double(), torch.eye(16)[:3].double()
    for size, does in ((1.0, True), (4 * EPSILON, True), (EPSILON / 2, False), (0.0, False)):
        sized = up * torch.tensor([1.0, 1.0, size])
        assert (_whole_bases(sized.t() @ sized, down @ down.t()) is not None) is does


def test_many_modules_are_compared_as_each_alone() -> None:
    modules = {str(seed): (delta_of(2, seed), delta_of(3, seed + 1)) for seed in range(5)}
    told: list[tuple[int, int]] = []
    found = interferences(modules, lambda *count: told.append(count))
    assert told == [(done, 5) for done in range(1, 6)]
    assert list(found) == list(modules)
    assert found == {name: interference(*pair) for name, pair in modules.items()}
    assert interferences({}) == {}
