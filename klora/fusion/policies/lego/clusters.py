"""LoRA-LEGO's clustering (arXiv 2409.16167): the rank-wise units of two LoRAs become the units of one.

A unit is one row a of down and the column b of up that belongs to it; ΔW is the sum of the b·aᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from klora.errors import MismatchError
from klora.lora.deltas import Delta
from klora.lora.deltas.computed import FactorDelta, low_rank

ITERATIONS = 50


def units(delta: Delta, strength: float) -> Tensor:
    """The units (a, b) of strength·ΔW as rows, fp64 (≤ r, in·kh·kw + out), without those that are zero.

    How a product is split into its two factors is arbitrary; here a and b have the same length, so that both count
    alike in the clustering. Raises MismatchError for a family that has no such units.
    """
    factors = low_rank(delta)
    if factors is None:
        raise MismatchError(
            f"{delta.file}: {delta.key}: is a {delta.family}, which has no rank-wise units for lego to cluster;"
            " use another policy, or plain LoRA files"
        )
    b, a = factors[0].t().double() * (delta.scale * strength), factors[1].double()
    length_a, length_b = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    there = (length_a * length_b).flatten() > 0
    a, b, length_a, length_b = a[there], b[there], length_a[there], length_b[there]
    length = (length_a * length_b).sqrt()
    return torch.cat([a * (length / length_a), b * (length / length_b)], dim=1)


def k_means(points: Tensor, k: int, seed: int) -> Tensor:
    """Put each of `points` (n, d) in one of k ≤ n clusters: labels (n,). Seeded by k-means++, so reproducible."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator, device=points.device)]
    while len(centres) < k:
        distance = torch.cdist(points, centres).square().amin(1)
        weights = distance if distance.max() > 1e-20 else torch.ones_like(distance)
        centres = torch.cat([centres, points[torch.multinomial(weights, 1, generator=generator)]])
    labels = torch.full((len(points),), -1, device=points.device)
    for _ in range(ITERATIONS):
        nearest = torch.cdist(points, centres).argmin(1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        centres = _means(points, labels, centres)
    return labels


def merge_units(
    deltas: Sequence[Delta], strengths: Sequence[float], seed: int, clusters: int | None = None
) -> FactorDelta:
    """One LoRA of rank k (`clusters`, else max(r)), at most the number of units, in the place of the first of `deltas`.

    Units are normalised and clustered. Each centroid gets the mean norm of its cluster's units, which averaging had
    shrunk (parameter reweighting); the sum of k of them is scaled by √(r/k), as its variance grows with their number
    (output reweighting). r is the mean number of units of those deltas that have any.
    """
    each = [units(delta, strength) for delta, strength in zip(deltas, strengths, strict=True)]
    found = torch.cat(each)
    columns = deltas[0].columns
    ranks = [len(own) for own in each if len(own)]
    k = min(clusters or max(ranks, default=0), len(found))
    merged = _centroids(found, k, seed).float() if k else found.new_zeros(1, found.shape[1]).float()
    scale = math.sqrt(math.fsum(ranks) / len(ranks) / len(merged)) if ranks else 1.0
    return FactorDelta.like(deltas[0], merged[:, columns:].t().contiguous(), merged[:, :columns].contiguous(), scale)


def _centroids(found: Tensor, k: int, seed: int) -> Tensor:
    norms = found.norm(dim=1, keepdim=True)
    labels = k_means(found / norms, k, seed)
    rows = []
    for label in range(k):
        members = labels == label
        if members.any():
            centre = (found[members] / norms[members]).mean(0)
            rows.append(centre / centre.norm().clamp_min(1e-12) * norms[members].mean())
    return torch.stack(rows)


def _means(points: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """Mean of each cluster's points; an empty cluster keeps its centre."""
    count = torch.bincount(labels, minlength=len(centres)).clamp_min(1)[:, None]
    sums = torch.zeros_like(centres).index_add_(0, labels, points)
    empty = torch.bincount(labels, minlength=len(centres))[:, None] == 0
    return torch.where(empty, centres, sums / count)
