"""Scores on an accelerator; its operations run here on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klora.errors import LoraValueError
from klora.fusion import device_scores
from klora.fusion.device_scores import _factors, full_precision, is_low_rank, score_low_rank, scores_on
from klora.fusion.scores import score_deltas, standard_ks
from klora.lora.deltas import Delta
from klora.lora.deltas.computed import FactorDelta
from klora.lora.file import LoraFile
from tests.support.lora_files import write_lora

CPU = torch.device("cpu")
NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def delta_of(rows: int, columns: int, rank: int, scale: float, seed: int) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return FactorDelta("x.safetensors", str(seed), rank, scale * rank, scale, (rows, columns), up, down)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 4)), min_size=1, max_size=4),
    copies=st.integers(1, 3),
    scale=st.sampled_from([0.0, 0.5, -2.0]),
    ks=st.lists(st.integers(1, 1000), min_size=1, max_size=3),
    chunk=st.integers(1, 500),
)
def test_they_are_those_of_the_cpu_however_modules_are_batched_and_rows_are_cut(
    sizes: list[tuple[int, int, int]], copies: int, scale: float, ks: list[int], chunk: int
) -> None:
    deltas = [delta_of(*size, scale, seed) for seed, size in enumerate(sizes * copies)]
    # Each module with one K of its own.
    wanted = {delta.key: (delta, {*ks, 1 + index}) for index, delta in enumerate(deltas)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_scores, "CHUNK_ENTRIES", chunk)
        found = score_low_rank(wanted, CPU)
    expected = score_deltas(wanted)
    assert list(found) == list(expected)
    for name, score in found.items():
        assert (score.shape, score.rank, score.alpha) == (
            expected[name].shape,
            expected[name].rank,
            expected[name].alpha,
        )
        assert score.sums == pytest.approx(expected[name].sums, rel=1e-6)
        assert (score.l1, score.fro2) == pytest.approx((expected[name].l1, expected[name].fro2), rel=1e-6)
        assert all(total <= score.l1 for total in score.sums.values())


def test_convolutions_and_half_precision_do_too(tmp_path: Path) -> None:
    shapes = {NAME: (96, 64), "down_blocks.0.resnets.0.conv1": (16, 8, 3, 3)}
    file = LoraFile.open(write_lora(tmp_path / "a.safetensors", shapes, rank=4, alpha=2.0, dtype=torch.float16))
    wanted = {name: (delta, standard_ks(delta.rank)) for name, delta in file.modules.items()}
    assert all(is_low_rank(delta) for delta, _ in wanted.values())
    expected = score_deltas(wanted)
    for name, score in score_low_rank(wanted, CPU).items():
        assert score.sums == pytest.approx(expected[name].sums, rel=1e-6)


def test_sums_of_many_entries_are_as_exact_as_their_entries() -> None:
    delta = delta_of(64, 2048, 1, 1.0, 3)
    entries = delta.rows(0, 64).double().abs().flatten().sort(descending=True).values
    ks = {1000, 60_000}
    score = score_low_rank({"m": (delta, ks)}, CPU)["m"]
    assert score.l1 == pytest.approx(float(entries.sum()), rel=1e-12)
    assert score.sums == {k: pytest.approx(float(entries[:k].sum()), rel=1e-12) for k in ks}


def test_how_far_it_is_is_told_after_each_batch_and_a_large_module_is_a_batch_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = [(8, 8, 2), (8, 8, 2), (20, 8, 2), (20, 8, 2)]
    deltas = [delta_of(*size, 1.0, seed) for seed, size in enumerate(sizes)]
    monkeypatch.setattr(device_scores, "CHUNK_ENTRIES", 2 * 8 * 8)
    told: list[tuple[int, int]] = []
    score_low_rank({d.key: (d, {4}) for d in deltas}, CPU, lambda done, of: told.append((done, of)))
    assert told == [(2, 4), (3, 4), (4, 4)]


def test_nan_is_told_by_file_and_key(tmp_path: Path) -> None:
    delta = delta_of(8, 8, 2, 1.0, 0)
    delta.up[0, 0] = float("inf")
    with pytest.raises(LoraValueError, match=r"x\.safetensors: 0: "):
        score_low_rank({"m": (delta, {4})}, CPU)


def test_a_norm_that_is_no_number_any_more_is_refused_though_the_sum_is_one() -> None:
    delta = delta_of(8, 8, 1, 1.0, 0)
    delta.up[:], delta.down[:] = 1.5e19, 1.5e19
    assert delta.matrix().double().sum().isfinite()
    with pytest.raises(LoraValueError, match=r"x\.safetensors: 0: "):
        score_low_rank({"m": (delta, {4})}, CPU)


def test_all_is_computed_on_the_device_asked_for_whatever_the_default_is() -> None:
    delta, meta = delta_of(8, 8, 2, 1.0, 0), torch.device("meta")
    assert {factor.device for factor in _factors([delta], meta)} == {meta}
    expected = score_low_rank({"m": (delta, {4, 6})}, CPU)
    with meta:
        found = score_low_rank({"m": (delta, {4, 6})}, CPU)
    assert found == expected


def test_only_gpus_score_and_only_what_is_one_product(tmp_path: Path) -> None:
    assert scores_on(torch.device("cuda", 0))
    assert not scores_on(CPU)
    assert not scores_on(torch.device("mps"))
    lokr = LoraFile.open(write_lora(tmp_path / "a.safetensors", {NAME: (8, 8)}, family="lokr"))
    assert not is_low_rank(lokr.modules[NAME])


def test_products_are_exact_also_where_the_host_has_allowed_tf32() -> None:
    backend = torch.backends.cuda.matmul
    before = backend.allow_tf32
    try:
        for allowed in (True, False):
            backend.allow_tf32 = allowed
            with full_precision():
                assert getattr(backend, "fp32_precision", "ieee") == "ieee"
            assert backend.allow_tf32 == allowed
    finally:
        backend.allow_tf32 = before
