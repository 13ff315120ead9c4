"""Policies that make new deltas of two: NP-LoRA and LoRA-LEGO."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from klora.errors import MismatchError
from klora.fusion.policies import make_policy, resolve
from klora.fusion.policies.lego.clusters import k_means, units
from klora.fusion.policies.np_lora.projection import orthonormal, shrink
from klora.lora.deltas import Delta
from klora.lora.deltas.computed import FactorDelta, low_rank
from klora.lora.file import LoraFile
from klora.settings import Settings
from tests.support.lora_files import FAMILIES, write_lora

NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
TALL = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"
SHAPES = {NAME: (12, 16), CONV: (12, 16, 3, 3), TALL: (20, 7)}
LIKE = FactorDelta("f.safetensors", "k", 1, 1.0, 1.0, (12, 16), torch.zeros(12, 1), torch.zeros(1, 16))
seeds = st.integers(0, 2**31)
ranks = st.integers(1, 6)


def delta_of(rank: int, seed: int, scale: float = 1.0) -> FactorDelta:
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(12, rank, generator=generator), torch.randn(rank, 16, generator=generator)
    return FactorDelta.like(LIKE, up, down, scale)


def combined(policy: str, subject: Delta, style: Delta, **settings: object) -> tuple[Delta | None, Delta | None]:
    return make_policy(resolve(Settings.parse({"policy": policy, **settings}), None)).combine(NAME, subject, style)


def file_delta(folder: Path, family: str, name: str = NAME, seed: int = 0, **options: object) -> Delta:
    path = folder / f"{family}{seed}.safetensors"
    write_lora(path, {name: SHAPES[name]}, family=family, seed=seed, **options)
    return LoraFile.open(path).modules[name]


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-4 * float(b.abs().max().clamp_min(1e-6)))


@given(ranks, st.integers(4, 16), seeds, st.floats(0, 50))
def test_inside_the_styles_row_space_rows_shrink_by_1_over_1_plus_mu_and_outside_they_stay(
    rank: int, width: int, seed: int, mu: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    style, A = torch.randn(rank, width, generator=generator), torch.randn(3, width, generator=generator)
    Q = orthonormal(style)
    assert close(Q.T @ Q, torch.eye(Q.shape[1]))
    assert close(style @ Q @ Q.T, style)
    inside = A @ Q @ Q.T
    shrunk = shrink(A, Q, mu)
    assert torch.allclose(shrunk @ Q @ Q.T, inside / (1 + mu), atol=1e-4)
    assert torch.allclose(shrunk - shrunk @ Q @ Q.T, A - inside, atol=1e-4)


def test_a_basis_has_no_more_vectors_than_the_rank() -> None:
    A = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    assert orthonormal(torch.cat([A, A, A.sum(0, keepdim=True)])).shape == (10, 2)
    assert orthonormal(torch.zeros(3, 10)).shape == (10, 0)
    for size in (1e-6, 1e6):
        assert orthonormal(size * torch.cat([A, A])).shape == (10, 2)


@given(ranks, ranks, seeds, st.floats(0, 10), st.floats(0.1, 4))
def test_np_lora_changes_the_subjects_down_alone(r_c: int, r_s: int, seed: int, mu: float, scale: float) -> None:
    subject, style = delta_of(r_c, seed, scale), delta_of(r_s, seed + 1)
    new_subject, new_style = combined("np-lora", subject, style, mu=mu)
    assert new_style is style
    assert torch.equal(new_subject.factors().up, subject.up)
    Q = torch.linalg.qr(style.down.T).Q
    expected = subject.matrix() @ (torch.eye(16) - mu / (1 + mu) * Q @ Q.T)
    assert close(new_subject.matrix(), expected)


def test_np_lora_with_mu_0_or_a_style_of_zeros_leaves_the_subject_as_it_is() -> None:
    subject, style = delta_of(3, 1), delta_of(2, 2)
    assert torch.equal(combined("np-lora", subject, style, mu=0)[0].matrix(), subject.matrix())
    zero = FactorDelta.like(LIKE, torch.zeros(12, 2), style.down, 1.0)
    assert torch.equal(combined("np-lora", subject, zero)[0].matrix(), subject.matrix())
    silent = FactorDelta.like(LIKE, style.up, style.down, 0.0)
    assert torch.equal(combined("np-lora", subject, silent)[0].matrix(), subject.matrix())


def test_np_lora_takes_the_span_of_the_styles_down_whatever_its_up_reaches() -> None:
    subject, style = delta_of(3, 1), delta_of(2, 2)
    flat = FactorDelta.like(LIKE, style.up[:, :1].repeat(1, 2), style.down, 1.0)
    assert torch.equal(combined("np-lora", subject, flat)[0].matrix(), combined("np-lora", subject, style)[0].matrix())


@pytest.mark.parametrize("name", [NAME, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("subject_family", FAMILIES)
@pytest.mark.parametrize("style_family", ["lora", "loha", "full"])
def test_np_lora_works_for_every_family_or_says_why_not(
    tmp_path: Path, name: str, subject_family: str, style_family: str
) -> None:
    subject = file_delta(tmp_path, subject_family, name, seed=1)
    style = file_delta(tmp_path, style_family, name, seed=2, rank=2)
    if "dora" in subject_family:
        with pytest.raises(MismatchError, match="DoRA"):
            combined("np-lora", subject, style)
        return
    made = combined("np-lora", subject, style, mu=1)[0]
    flat, rows = subject.matrix().reshape(12, -1), style.matrix().reshape(12, -1)
    basis = torch.linalg.svd(rows, full_matrices=False)
    there = basis.S / basis.S[0] > 1e-5
    Q = basis.Vh[there].T
    assert made.shape == subject.shape
    assert close(made.matrix().reshape(12, -1), flat - 0.5 * flat @ Q @ Q.T)
    assert close(made.part(3, 7).matrix(), made.matrix()[3:7])


@given(ranks, seeds)
def test_lego_of_a_lora_with_itself_is_that_lora(rank: int, seed: int) -> None:
    delta = delta_of(rank, seed)
    made, other = combined("lego", delta, delta)
    assert other is None
    assert made.rank == rank
    # The same matrix, and so the same row and column space.
    assert close(made.matrix(), delta.matrix())


@given(ranks, ranks, seeds, seeds)
def test_lego_has_the_larger_rank_and_lies_in_the_span_of_both(r_c: int, r_s: int, seed: int, draw: int) -> None:
    subject, style = delta_of(r_c, seed), delta_of(r_s, seed + 1)
    made = combined("lego", subject, style, seed=draw)[0]
    assert made.rank <= max(r_c, r_s)
    Q = orthonormal(torch.cat([subject.down, style.down]))
    assert close(made.matrix() @ Q @ Q.T, made.matrix())
    assert torch.equal(combined("lego", subject, style, seed=draw)[0].matrix(), made.matrix())


@given(ranks, ranks, seeds, st.floats(-2, 2).filter(lambda x: abs(x) > 0.01))
def test_lego_takes_the_users_strengths_into_its_units(r_c: int, r_s: int, seed: int, strength: float) -> None:
    subject, style = delta_of(r_c, seed), delta_of(r_s, seed + 1)
    alone = combined("lego", subject, style, subject_strength=strength, style_strength=0)[0]
    assert close(alone.matrix(), strength * subject.matrix())
    assert make_policy(resolve(Settings(policy="lego"), None)).folds_strengths


@given(ranks, ranks, seeds, st.integers(1, 12))
def test_lego_scales_its_output_by_the_root_of_rank_over_clusters(r_c: int, r_s: int, seed: int, k: int) -> None:
    subject, style = delta_of(r_c, seed), delta_of(r_s, seed + 1)
    made = combined("lego", subject, style, clusters=k)[0]
    assert made.rank <= min(k, r_c + r_s)
    assert made.scale == pytest.approx(((r_c + r_s) / 2 / made.rank) ** 0.5)


def test_lego_with_a_cluster_for_every_unit_is_the_sum_reweighted() -> None:
    subject, style = delta_of(2, 3), delta_of(4, 4)
    made = combined("lego", subject, style, clusters=6)[0]
    assert close(made.matrix(), (3 / 6) ** 0.5 * (subject.matrix() + style.matrix()))


def test_lego_beside_a_file_of_zeros_is_the_other() -> None:
    delta, zero = delta_of(2, 1), FactorDelta.like(LIKE, torch.zeros(12, 2), torch.ones(2, 16), 1.0)
    subject, style = combined("lego", delta, zero)
    assert close(subject.matrix(), delta.matrix())
    assert style is None
    subject, style = combined("lego", zero, delta)
    assert subject is None
    assert close(style.matrix(), delta.matrix())


@pytest.mark.parametrize("family", ["lora", "lora-cp"])
def test_lego_merges_convolutions(tmp_path: Path, family: str) -> None:
    delta = file_delta(tmp_path, family, CONV, seed=1, alpha=2.0)
    made = combined("lego", delta, delta)[0]
    assert made.shape == (12, 16, 3, 3)
    assert close(made.matrix(), delta.matrix())


@pytest.mark.parametrize("family", ["loha", "lokr", "full", "dora"])
def test_lego_names_the_family_that_has_no_units(tmp_path: Path, family: str) -> None:
    with pytest.raises(MismatchError, match=f"is a {family}"):
        combined("lego", file_delta(tmp_path, family, seed=1), file_delta(tmp_path, "lora", seed=2))


@given(seeds, st.integers(1, 6), st.integers(0, 20))
def test_k_means_finds_clusters_that_are_there(seed: int, k: int, copies: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.nn.functional.normalize(torch.randn(k, 8, generator=generator).double(), dim=1)
    labels = k_means(points.repeat(copies + 1, 1), k, seed)
    assert torch.equal(labels, labels[:k].repeat(copies + 1))
    assert len(set(labels.tolist())) == k


@given(ranks, seeds, st.floats(0.01, 100))
def test_how_a_product_is_split_does_not_matter_to_its_units(rank: int, seed: int, factor: float) -> None:
    delta = delta_of(rank, seed)
    other = FactorDelta.like(LIKE, delta.up * factor, delta.down / factor, 1.0)
    assert torch.allclose(units(delta, 1.0), units(other, 1.0), atol=1e-4)


def test_factors_of_a_computed_delta_are_its_own() -> None:
    delta = delta_of(3, 0, 0.5)
    up, down = low_rank(delta)
    assert torch.allclose(0.5 * up @ down, delta.matrix(), atol=1e-6)
    assert torch.allclose(delta.part(2, 5).matrix(), delta.matrix()[2:5], atol=1e-6)
