"""LoRA-LEGO's clustering, by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from klora.fusion.policies.lego.clusters import _means, k_means, merge_units, units
from klora.lora.deltas.computed import FactorDelta

OUT, IN = 5, 4


def delta_of(up: list[list[float]], down: list[list[float]]) -> FactorDelta:
    """Of columns of up and rows of down, each as far as it is not zero."""

    def filled(rows: list[list[float]], width: int) -> Tensor:
        return torch.tensor([row + [0.0] * (width - len(row)) for row in rows])

    like = FactorDelta("a.safetensors", "key", 1, 1.0, 1.0, (OUT, IN), torch.zeros(OUT, 1), torch.zeros(1, IN))
    return FactorDelta.like(like, filled(up, OUT).t(), filled(down, IN), 1.0)


def corner(matrix: Tensor) -> Tensor:
    assert not matrix[2:].any()
    assert not matrix[:, 2:].any()
    return matrix[:2, :2]


def test_a_centroid_has_the_mean_direction_and_the_mean_norm() -> None:
    # Units (2e₁, 2e₁) and (6e₂, 6e₁): directions (e₁, e₁)/√2 and (e₂, e₁)/√2, norms 2√2 and 6√2.
    one, two = delta_of([[2]], [[2]]), delta_of([[6]], [[0, 6]])
    merged = merge_units([one, two], [1.0, 1.0], 0, clusters=1)
    # The mean direction ((e₁+e₂)/2, e₁)/√2 has the length √¾; with the norm 4√2 the product is 8/¾·e₁(e₁+e₂)ᵀ.
    assert torch.allclose(corner(merged.matrix()), torch.tensor([[8 / 0.75, 8 / 0.75], [0, 0]]))


def test_units_are_clustered_by_direction_whatever_their_norm() -> None:
    one, two = delta_of([[1], [0, 10]], [[1], [0, 10]]), delta_of([[10], [0, 1]], [[10], [0, 1]])
    for seed in range(5):
        merged = merge_units([one, two], [1.0, 1.0], seed)
        assert merged.rank == 2
        assert torch.allclose(corner(merged.matrix()), 5.5**2 * torch.eye(2))


def test_a_small_lora_counts_as_a_large_one_does() -> None:
    small = delta_of([[1e-3]], [[1e-3]])
    assert len(units(small, 1.0)) == 1
    assert torch.allclose(merge_units([small, small], [1.0, 1.0], 0).matrix(), small.matrix())


def test_what_is_merged_takes_the_place_of_the_first() -> None:
    one = delta_of([[1]], [[1]])
    merged = merge_units([one, dataclasses.replace(one, file="b.safetensors")], [1.0, 1.0], 0)
    assert (merged.file, merged.shape) == ("a.safetensors", (OUT, IN))


def test_two_loras_of_zeros_are_zero() -> None:
    zero = delta_of([[0]], [[1]])
    merged = merge_units([zero, zero], [1.0, 1.0], 0)
    assert (merged.rank, merged.scale, merged.up.shape, merged.down.shape) == (1, 1.0, (OUT, 1), (1, IN))
    assert not merged.matrix().any()


def test_every_delta_has_a_strength() -> None:
    one = delta_of([[1]], [[1]])
    with pytest.raises(ValueError, match="zip"):
        merge_units([one, one], [1.0], 0)


@given(st.integers(1, 8), st.integers(0, 2**31))
def test_there_are_no_more_clusters_than_asked_for(k: int, seed: int) -> None:
    points = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)).double()
    labels = k_means(points, k, seed)
    assert labels.min() >= 0
    assert len(labels.unique()) <= k
    assert labels.max() < k


def test_equal_points_are_one_cluster_however_many_are_asked_for() -> None:
    assert len(k_means(torch.ones(4, 2), 3, 0).unique()) == 1


def test_an_empty_cluster_keeps_its_centre() -> None:
    points, centres = torch.tensor([[1.0], [3.0], [8.0]]), torch.tensor([[0.0], [5.0], [7.0], [9.0]])
    assert _means(points, torch.tensor([0, 0, 2]), centres).flatten().tolist() == [2.0, 5.0, 8.0, 9.0]
