"""Blockwise top-K sums against the plain definition: sort everything, add up the first K."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from klora.errors import LoraValueError
from klora.fusion import scores, threads
from klora.fusion.scores import ModuleScore, Workspace, score_delta, score_deltas, standard_ks, top_k_sums
from klora.lora.file import LoraFile
from tests.support.lora_files import write_lora
from tests.support.scoring import score_all

KS = tuple(2**i for i in range(17))
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1."


class Matrix:
    """A delta that is one given matrix, and counts how often its rows are read."""

    file, key, rank, alpha, scale = "made.safetensors", "module", 4, 4.0, 1.0

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values.float()
        self.shape = tuple(values.shape)
        self.read = 0

    def rows(self, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        self.read += stop - start
        rows = self.values[start:stop].reshape(stop - start, -1)
        return rows.clone() if out is None else out.copy_(rows)

    def loaded(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def check_finite(self) -> None:
        if not torch.isfinite(self.values).all():
            raise LoraValueError(self.file, "holds NaN", "use another file", self.key)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """As many threads as that for torch, and then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def brute_force(values: torch.Tensor, k: int) -> float:
    ordered = values.abs().flatten().double().sort(descending=True).values
    return math.fsum(ordered[:k].tolist())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks and rough samples, so that small matrices go through everything that large ones do."""
    monkeypatch.setattr(scores, "BLOCK_ENTRIES", 1500)
    monkeypatch.setattr(scores, "SAMPLE_ENTRIES", 64)
    monkeypatch.setattr(scores, "SUM_WIDTH", 64)


def make(kind: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    if kind == "low rank":
        return torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
    if kind == "all equal":
        return torch.full((rows, columns), -0.3)
    if kind == "all zero":
        return torch.zeros(rows, columns)
    if kind == "mostly zero":
        return normal * (torch.rand(rows, columns, generator=generator) < 0.02)
    if kind == "few values":
        return (normal * 2).round()
    if kind == "giant row":
        normal[rows // 2] *= 1e4
        return normal
    if kind == "giant first block":
        normal[: max(1, rows // 8)] *= 1e4
        return normal
    if kind in ("ascending", "descending"):
        ordered = normal.abs().flatten().sort(descending=kind == "descending").values
        return ordered.view(rows, columns)
    if kind == "wide range":
        return normal.sign() * torch.exp2(normal * 12)
    return normal


KINDS = (
    "normal",
    "low rank",
    "all equal",
    "all zero",
    "mostly zero",
    "few values",
    "giant row",
    "giant first block",
    "ascending",
    "descending",
    "wide range",
)


@settings(max_examples=150)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 90),
    columns=st.integers(1, 120),
    ks=st.sets(st.integers(1, 12000), min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
)
def test_blockwise_is_the_full_top_k(kind: str, rows: int, columns: int, ks: set[int], seed: int) -> None:
    values = make(kind, rows, columns, seed)
    score = score_delta(Matrix(values), ks)
    for k in ks:
        expected = brute_force(values, k)
        assert score.sums[k] == pytest.approx(expected, rel=1e-12, abs=0)
        assert score.top_k(k) == score.sums[k]
    assert score.l1 == pytest.approx(float(values.double().abs().sum()), rel=1e-12)
    assert score.fro2 == pytest.approx(float(values.double().square().sum()), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_of_real_size_is_scored_exactly(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    values = make(kind, 1280, 900, seed=1)
    score = score_delta(Matrix(values), KS)
    assert tuple(score.sums) == KS
    ordered = np.sort(values.abs().numpy().ravel())[::-1].astype(np.float64)
    for k in KS:
        assert score.sums[k] == pytest.approx(ordered[:k].sum(), rel=1e-12, abs=0)
    assert score.l1 == pytest.approx(ordered.sum(), rel=5e-7, abs=0)
    assert score.fro2 == pytest.approx(np.square(ordered).sum(), rel=5e-7, abs=0)


@settings(max_examples=100)
@given(
    st.lists(st.floats(0, 2.0**99, width=32) | st.sampled_from([0.0, 1.0, 2.0]), max_size=200),
    st.lists(st.integers(1, 250), max_size=5),
)
def test_top_k_sums_of_any_values(values: list[float], ks: list[int]) -> None:
    expected = [math.fsum(sorted(values, reverse=True)[:k]) for k in ks]
    assert top_k_sums(np.array(values, dtype=np.float32), ks) == pytest.approx(expected, rel=1e-12)


@settings(max_examples=40)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**16))
def test_prefix_sums_rise_and_flatten(kind: str, seed: int) -> None:
    values = make(kind, 40, 60, seed)
    ks = [*range(1, 60), *range(60, 2400, 90)]
    score = score_delta(Matrix(values), ks)
    sums = [0.0, *(score.sums[k] for k in ks)]
    slopes = [(b - a) / (q - p) for a, b, p, q in zip(sums, sums[1:], [0, *ks], ks, strict=False)]
    assert min(slopes) >= 0
    assert all(later <= earlier * (1 + 1e-9) + 1e-9 * slopes[0] for earlier, later in itertools.pairwise(slopes))
    assert sums[-1] <= score.l1


@settings(max_examples=40)
@given(factor=st.floats(1e-4, 1e4), seed=st.integers(0, 2**16))
def test_scores_scale_with_the_delta(factor: float, seed: int) -> None:
    values = make("low rank", 40, 60, seed)
    one, other = score_delta(Matrix(values), KS), score_delta(Matrix(values * factor), KS)
    assert other.l1 == pytest.approx(one.l1 * factor, rel=1e-5)
    assert other.fro2 == pytest.approx(one.fro2 * factor**2, rel=1e-5)
    assert all(other.sums[k] == pytest.approx(one.sums[k] * factor, rel=1e-5) for k in KS)


def test_a_power_of_two_as_alpha_scales_scores_exactly(tmp_path: Path) -> None:
    shapes = {ATTENTION + "to_q": (48, 40)}
    files = [LoraFile.open(write_lora(tmp_path / f"{a}.safetensors", shapes, rank=4, alpha=a)) for a in (4.0, 16.0)]
    small, large = (score_all(file)[ATTENTION + "to_q"] for file in files)
    assert large.alpha == 4 * small.alpha
    assert large.l1 == 4 * small.l1
    assert large.sums == {k: 4 * s for k, s in small.sums.items()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["normal", "low rank"])
def test_sums_of_a_large_module_are_right_to_a_hundred_millionth(
    kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    values = make(kind, 1280, 256, seed)
    score = score_delta(Matrix(values), [64])
    assert score.l1 == pytest.approx(float(values.double().abs().sum()), rel=1e-8)
    assert score.fro2 == pytest.approx(float(values.double().square().sum()), rel=1e-8)


def test_ordinary_modules_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    delta = Matrix(make("low rank", 1280, 1280, seed=3))
    score_delta(delta, KS)
    assert delta.read == 1280


@pytest.mark.parametrize(("kind", "k"), [("ascending", 100), ("mostly zero", 1200)])
def test_rows_that_rise_and_entries_that_are_few_are_read_once(kind: str, k: int) -> None:
    values = make(kind, 80, 100, seed=0)
    delta = Matrix(values)
    assert score_delta(delta, [k]).sums[k] == pytest.approx(brute_force(values, k), rel=1e-12)
    assert delta.read == 80


def test_a_first_block_unlike_the_rest_is_read_again_and_scored_exactly() -> None:
    values = make("giant first block", 80, 100, seed=0)
    delta = Matrix(values)
    assert score_delta(delta, [1200]).sums[1200] == pytest.approx(brute_force(values, 1200), rel=1e-12)
    assert delta.read > 80


def test_a_kernel_is_scored_as_its_flat_matrix() -> None:
    values = make("normal", 24, 90, seed=5)
    flat, kernel = score_delta(Matrix(values), KS), score_delta(Matrix(values.view(24, 10, 3, 3)), KS)
    assert kernel.shape == (24, 10, 3, 3)
    assert dataclasses.replace(kernel, shape=flat.shape) == flat


def test_a_row_longer_than_a_block_is_scored() -> None:
    values = make("normal", 3, 4000, seed=5)
    assert score_delta(Matrix(values), [700]).sums[700] == pytest.approx(brute_force(values, 700), rel=1e-12)


def test_k_beyond_the_module_is_everything() -> None:
    score = score_delta(Matrix(make("normal", 4, 5, seed=0)), [3, 20, 1024])
    assert score.sums[20] == score.sums[1024] == score.top_k(10**9) == score.l1
    assert score.top_k(4) is None


def test_a_module_of_one_entry_is_scored() -> None:
    score = score_delta(Matrix(torch.tensor([[-3.0]])), [1, 4])
    assert (score.l1, score.fro2, score.sums) == (3.0, 9.0, {1: 3.0, 4: 3.0})


def test_runs_threads_and_used_buffers_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    delta, workspace = Matrix(make("low rank", 700, 900, seed=3)), Workspace()
    first = score_delta(delta, KS, workspace)
    score_delta(Matrix(make("wide range", 1280, 900, seed=9)), KS, workspace)
    with torch_threads(1):
        assert score_delta(delta, KS, workspace) == first
    with torch_threads(3):
        assert score_delta(delta, KS) == first


def test_many_modules_are_scored_as_each_alone_and_torch_keeps_its_threads() -> None:
    deltas = {str(seed): Matrix(make("low rank", 40, 70, seed)) for seed in range(20)}
    with torch_threads(3):
        many = score_deltas({name: (delta, {5, 50}) for name, delta in deltas.items()})
        here, later = torch.get_num_threads(), ThreadPoolExecutor(1).submit(torch.get_num_threads).result()
    assert list(many.items()) == [(name, score_delta(delta, [5, 50])) for name, delta in deltas.items()]
    assert (here, later) == (3, 3)


def test_the_first_bad_module_of_a_file_is_the_one_reported() -> None:
    deltas = {str(seed): Matrix(make("normal", 20, 30, seed)) for seed in range(30)}
    for name in ("7", "21"):
        deltas[name].values[3, 4] = math.nan
        deltas[name].key = f"module {name}"
    for _ in range(3):
        with pytest.raises(LoraValueError) as error:
            score_deltas({name: (delta, {5}) for name, delta in deltas.items()})
        assert error.value.key == "module 7"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_number_names_file_and_tensor(tmp_path: Path, bad: float) -> None:
    path = write_lora(tmp_path / "cat.safetensors", {ATTENTION + "to_q": (48, 40)}, rank=4)
    tensors = load_file(path)
    key = next(key for key in tensors if "up" in key)
    tensors[key][3, 1] = bad
    save_file(tensors, path)
    file = LoraFile.open(path)
    with pytest.raises(LoraValueError) as error:
        score_all(file)
    assert "cat.safetensors" in str(error.value)
    assert error.value.key == key


def test_a_product_beyond_fp32_is_an_error_too() -> None:
    delta = Matrix(torch.ones(2, 2))
    delta.rows = lambda start, stop, out: out.fill_(math.inf)  # type: ignore[method-assign]
    with pytest.raises(LoraValueError, match=r"made\.safetensors: module: .*too large"):
        score_delta(delta, KS)


def test_a_product_whose_squares_are_beyond_fp32_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(LoraValueError, match="too large") as error:
        score_delta(Matrix(torch.full((1280, 300), 1e30)), [5])
    assert (error.value.file, error.value.key) == (Matrix.file, Matrix.key)
    assert error.value.cure


def test_k_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        score_delta(Matrix(torch.ones(2, 2)), [0])


def test_a_file_is_scored_at_the_standard_and_the_wanted_k(tmp_path: Path) -> None:
    shapes = {ATTENTION + "to_q": (48, 40), ATTENTION + "to_k": (48, 64)}
    file = LoraFile.open(write_lora(tmp_path / "cat.safetensors", shapes, rank=4))
    scored = score_all(file, {ATTENTION + "to_k": {72}})
    assert list(scored) == list(file.modules)
    assert scored[ATTENTION + "to_q"].top_k(72) is None
    matrix = file.modules[ATTENTION + "to_k"].matrix()
    score = scored[ATTENTION + "to_k"]
    assert isinstance(score, ModuleScore)
    assert score.sums[72] == pytest.approx(brute_force(matrix, 72), rel=1e-6)
    assert {*standard_ks(4)} <= score.sums.keys()


@pytest.mark.parametrize("kind", ["normal", "low rank"])
def test_few_more_than_the_largest_are_gathered(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    gathered, above = [], scores._above
    monkeypatch.setattr(scores, "_above", lambda *args: gathered.append(above(*args)) or gathered[-1])
    score_delta(Matrix(make(kind, 1280, 1280, seed=3)), [16_384])
    assert 16_384 <= sum(values.size for values in gathered) < 2 * 16_384


def test_for_the_sum_of_all_entries_hardly_any_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered, above = [], scores._above
    monkeypatch.setattr(scores, "_above", lambda *args: gathered.append(above(*args)) or gathered[-1])
    score_delta(Matrix(make("normal", 60, 100, seed=3)), [6000, 9000])
    assert sum(values.size for values in gathered) < 600


@pytest.mark.parametrize("larger", range(4))
def test_where_fewer_than_k_are_larger_than_all_the_others_equal_ones_count(larger: int) -> None:
    values = torch.full((40, 100), 0.5)
    values.view(-1)[37 : 37 + 900 * larger : 900] = -8.0
    for k in range(1, 6):
        assert score_delta(Matrix(values), [k]).sums[k] == 8.0 * min(k, larger) + 0.5 * max(0, k - larger)


def test_how_far_it_is_is_told_after_each_module() -> None:
    told: list[tuple[int, int]] = []
    wanted = {str(seed): (Matrix(make("normal", 20, 30, seed)), {5}) for seed in range(3)}
    score_deltas(wanted, lambda done, of: told.append((done, of)))
    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("torchs", "most"), [(2, 4), (3, 2)])
def test_modules_are_scored_on_no_more_threads_than_torch_has_and_memory_allows(
    torchs: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "MAX_WORKERS", most)
    seen: set[int] = set()

    class Slow(Matrix):
        def rows(self, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
            seen.add(threading.get_ident())
            time.sleep(0.01)
            return super().rows(start, stop, out)

    with torch_threads(torchs):
        score_deltas({str(seed): (Slow(make("normal", 20, 30, seed)), {5}) for seed in range(12)})
    assert len(seen) <= 2


def test_no_more_threads_than_asked_for_compute_with_one_thread_each() -> None:
    seen: set[tuple[int, int]] = set()

    def look() -> None:
        seen.add((threading.get_ident(), torch.get_num_threads()))
        time.sleep(0.01)

    with torch_threads(2), threads.single_threaded_pool(9) as pool:
        for looked in [pool.submit(look) for _ in range(8)]:
            looked.result()
    assert len(seen) <= 2
    assert {count for _, count in seen} == {1}
