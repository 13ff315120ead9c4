from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from klora import cache as cache_module
from klora import entry_folder
from klora.cache import ScoreCache
from klora.errors import LoraFileError, LoraValueError
from klora.fusion.scores import FileScores, OnScored, score_delta, score_deltas, standard_ks
from klora.lora import disk
from klora.lora.deltas import Delta
from klora.lora.file import LoraFile
from klora.lora.side import Side
from tests.support.lora_files import write_lora
from tests.support.processes import end_of, start
from tests.support.scoring import score_all

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1."
SHAPES = {BLOCK + "to_q": (48, 40), BLOCK + "to_k": (48, 40), BLOCK + "to_v": (8, 9)}
TO_Q = BLOCK + "to_q"


@pytest.fixture
def file(tmp_path: Path) -> LoraFile:
    return LoraFile.open(write_lora(tmp_path / "cat.safetensors", SHAPES, rank=4, alpha=3.0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "made" / "when needed"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[set[int]]:
    """The K of every module that is really computed."""
    calls: list[set[int]] = []

    def counted(wanted: dict[str, tuple[Delta, set[int]]], on_scored: OnScored | None = None) -> FileScores:
        calls.extend(ks for _, ks in wanted.values())
        return score_deltas(wanted, on_scored)

    monkeypatch.setattr(cache_module, "score_deltas", counted)
    return calls


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are really read for their digest."""
    calls: list[Path] = []
    plain = disk.sha256
    monkeypatch.setattr(disk, "sha256", lambda path, known: calls.append(path) or plain(path, known))
    return calls


def entries(folder: Path, kind: str = "scores") -> list[Path]:
    return sorted(folder.glob(f"{kind}-*"))


def rewrite(entry: Path, change: Callable[[dict], object]) -> None:
    """Change an entry's data and seal it again, so that only the change is wrong with it."""
    data = json.loads(entry.read_bytes())
    del data["check"]
    change(data)
    entry.write_bytes(entry_folder._seal(data))


def test_cached_scores_are_the_computed_ones_to_the_last_bit(
    file: LoraFile, folder: Path, computed: list[set[int]]
) -> None:
    wanted = {name: {16, 72} if name == TO_Q else set() for name in SHAPES}
    fresh = ScoreCache(folder).scores(Side.alone(file), wanted)
    assert len(computed) == len(SHAPES)
    assert ScoreCache(folder).scores(Side.alone(file), wanted) == fresh == score_all(file, {TO_Q: {72}})
    assert len(computed) == len(SHAPES)
    assert list(fresh) == list(file.modules)


def test_a_cached_file_is_neither_read_nor_scored(
    file: LoraFile, folder: Path, computed: list[set[int]], hashed: list[Path]
) -> None:
    ScoreCache(folder).scores(Side.alone(file))
    ScoreCache(folder).scores(Side.alone(LoraFile.open(file.path)))
    assert len(hashed) == 1
    assert len(computed) == len(SHAPES)


def test_a_new_k_is_computed_once_for_its_module_and_added(
    file: LoraFile, folder: Path, computed: list[set[int]]
) -> None:
    cache = ScoreCache(folder)
    cache.scores(Side.alone(file))
    computed.clear()
    assert (
        cache.scores(Side.alone(file), {TO_Q: [24]})[TO_Q].top_k(24) == score_delta(file.modules[TO_Q], [24]).sums[24]
    )
    assert computed == [{24}]
    assert cache.scores(Side.alone(file), {TO_Q: [24]})[TO_Q].sums.keys() == {*standard_ks(4), 24}
    assert computed == [{24}]


def test_only_what_is_wanted_is_scored_and_the_rest_when_it_is(
    file: LoraFile, folder: Path, computed: list[set[int]]
) -> None:
    assert ScoreCache(folder).scores(Side.alone(file), {TO_Q: {24}}).keys() == {TO_Q}
    assert len(computed) == 1
    assert ScoreCache(folder).scores(Side.alone(file)) == score_all(file, {TO_Q: {24}})
    assert len(computed) == len(SHAPES)
    assert ScoreCache(folder).scores(Side.alone(file), {TO_Q: {24}})[TO_Q].top_k(24) is not None
    assert len(computed) == len(SHAPES)


def test_a_partner_of_another_usual_rank_needs_no_scoring(
    file: LoraFile, folder: Path, computed: list[set[int]]
) -> None:
    ScoreCache(folder).scores(Side.alone(file))
    computed.clear()
    for rank in (1, 8, 32, 64, 128):
        assert ScoreCache(folder).scores(Side.alone(file), {TO_Q: {4 * rank}})[TO_Q].top_k(4 * rank) is not None
    assert not computed


def test_a_copy_under_another_name_shares_its_entry(file: LoraFile, folder: Path, computed: list[set[int]]) -> None:
    cache = ScoreCache(folder)
    cache.scores(Side.alone(file))
    copy = file.path.with_name("dog.safetensors")
    copy.write_bytes(file.path.read_bytes())
    cache.scores(Side.alone(LoraFile.open(copy)))
    assert len(computed) == len(SHAPES)
    assert len(entries(folder)) == 1


def test_a_k_beyond_the_module_is_cached_as_everything(file: LoraFile, folder: Path) -> None:
    for _ in range(2):
        score = ScoreCache(folder).scores(Side.alone(file), {TO_Q: {10**6}})[TO_Q]
        assert score.sums[10**6] == score.top_k(10**6) == score.l1


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda entry: entry.write_bytes(b""),
    "half": lambda entry: entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2]),
    "binary": lambda entry: entry.write_bytes(os.urandom(999)),
    "not an object": lambda entry: entry.write_bytes(b"[1, 2]"),
    "deeply nested": lambda entry: entry.write_bytes(b"[" * 100_000),
    "flipped digit": lambda entry: entry.write_bytes(entry.read_bytes().replace(b"1", b"2", 90)[:-2] + b"}}"),
    "other version": lambda entry: rewrite(entry, lambda data: data.update(version=0)),
    "other file": lambda entry: rewrite(entry, lambda data: data.update(sha256="0" * 64)),
    "no modules": lambda entry: rewrite(entry, lambda data: data.pop("modules")),
    "modules of another": lambda entry: rewrite(
        entry, lambda data: data["modules"].update({"other": data["modules"].pop(TO_Q)})
    ),
    "wrong types": lambda entry: rewrite(entry, lambda data: data["modules"].update({TO_Q: 7})),
    "other rank": lambda entry: rewrite(entry, lambda data: data["modules"][TO_Q].update(rank=5)),
    "a text for a number": lambda entry: rewrite(entry, lambda data: data["modules"][TO_Q].update(l1="7")),
    "negative": lambda entry: rewrite(entry, lambda data: data["modules"][TO_Q].update(fro2=-1.0)),
    "no K": lambda entry: rewrite(entry, lambda data: data["modules"][TO_Q]["sums"].update({"x": 1.0})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_computed_anew_with_a_warning(file: LoraFile, folder: Path, damage: str) -> None:
    fresh = ScoreCache(folder).scores(Side.alone(file))
    DAMAGES[damage](entries(folder)[0])
    with pytest.warns(UserWarning, match="computing it anew") as caught:
        assert ScoreCache(folder).scores(Side.alone(file)) == fresh
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ScoreCache(folder).scores(Side.alone(file)) == fresh


def test_a_damaged_digest_is_computed_anew_with_a_warning(file: LoraFile, folder: Path) -> None:
    digest = ScoreCache(folder).sha256(file.path)
    entries(folder, "digest")[0].write_bytes(b"{}")
    with pytest.warns(UserWarning, match="computing it anew"):
        assert ScoreCache(folder).sha256(file.path) == digest == file.sha256


@pytest.mark.filterwarnings("ignore:scores cannot be kept")
def test_a_folder_in_an_entrys_place_is_survived(file: LoraFile, folder: Path) -> None:
    fresh = ScoreCache(folder).scores(Side.alone(file))
    entry = entries(folder)[0]
    entry.unlink()
    entry.mkdir()
    with pytest.warns(UserWarning, match="cache entry"):
        assert ScoreCache(folder).scores(Side.alone(file)) == fresh
    assert not entries(folder, ".part")


def test_a_pipe_in_an_entrys_place_does_not_block(file: LoraFile, folder: Path) -> None:
    fresh = ScoreCache(folder).scores(Side.alone(file))
    entry = entries(folder)[0]
    entry.unlink()
    os.mkfifo(entry)
    with pytest.warns(UserWarning, match="cache entry"):
        assert ScoreCache(folder).scores(Side.alone(file)) == fresh


def test_a_folder_that_cannot_be_made_costs_one_warning(file: LoraFile, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("in the way")
    cache = ScoreCache(tmp_path / "a file" / "cache")
    with pytest.warns(UserWarning, match="cannot be kept"):
        first = cache.scores(Side.alone(file))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.scores(Side.alone(file)) == first == score_all(file)


def test_a_failed_write_leaves_the_old_entry_and_no_rest(
    file: LoraFile, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ScoreCache(folder)
    cache.scores(Side.alone(file))
    before = entries(folder)[0].read_bytes()

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", disk_full)
    with pytest.warns(UserWarning, match="No space left"):
        assert cache.scores(Side.alone(file), {TO_Q: {24}})[TO_Q].top_k(24) is not None
    assert entries(folder)[0].read_bytes() == before
    assert not entries(folder, ".part")


def score_many(cache: ScoreCache, tmp_path: Path, count: int) -> list[LoraFile]:
    files = [LoraFile.open(write_lora(tmp_path / f"{i}.safetensors", SHAPES, rank=4, seed=i)) for i in range(count)]
    for file in files:
        cache.scores(Side.alone(file))
        for entry in cache.folder.glob("*.json"):  # every entry so far is one minute older
            os.utime(entry, ns=(0, entry.stat().st_mtime_ns - 60 * 10**9))
    return files


def test_what_was_used_longest_ago_makes_room(tmp_path: Path, folder: Path, computed: list[set[int]]) -> None:
    first, second = score_many(ScoreCache(folder), tmp_path, 2)
    ScoreCache(folder).scores(Side.alone(first))
    size = sum(entry.stat().st_size for entry in folder.iterdir())
    cache = ScoreCache(folder, max_bytes=size + 100)
    third = LoraFile.open(write_lora(tmp_path / "third.safetensors", SHAPES, rank=4, seed=7))
    cache.scores(Side.alone(third))
    assert sum(entry.stat().st_size for entry in folder.iterdir()) <= size + 100
    computed.clear()
    cache.scores(Side.alone(first))
    cache.scores(Side.alone(third))
    assert not computed
    cache.scores(Side.alone(second))
    assert len(computed) == len(SHAPES)


def test_the_size_stays_bounded(tmp_path: Path, folder: Path) -> None:
    for limit in (0, 3000, 9000):
        score_many(ScoreCache(folder, max_bytes=limit), tmp_path, 8)
        assert sum(entry.stat().st_size for entry in folder.glob("*")) <= limit


def test_foreign_files_are_left_alone_and_old_rests_removed(file: LoraFile, folder: Path) -> None:
    folder.mkdir(parents=True)
    foreign, rest = folder / "notes.txt", folder / ".part-old"
    for path in (foreign, rest):
        path.write_text("x" * 5000)
        os.utime(path, (0, 0))
    ScoreCache(folder, max_bytes=4000).scores(Side.alone(file))
    assert foreign.exists()
    assert not rest.exists()


def test_only_the_latest_special_k_are_kept(file: LoraFile, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MAX_SPECIAL_KS", 3)
    cache = ScoreCache(folder)
    for k in (3, 5, 6, 7, 9):
        cache.scores(Side.alone(file), {TO_Q: {k}})
    assert cache.scores(Side.alone(file), {TO_Q: {9}})[TO_Q].sums.keys() == {*standard_ks(4), 6, 7, 9}
    assert cache.scores(Side.alone(file), {TO_Q: {3, 6}})[TO_Q].sums.keys() >= {3, 6}


def score_again_and_again(file: Path, folder: Path, first: int) -> None:
    warnings.simplefilter("error")
    for k in range(first, 120, 2):
        ScoreCache(folder).scores(Side.alone(LoraFile.open(file)), {TO_Q: {k % 40 + 1}})


def test_two_processes_at_once_leave_a_sound_entry(file: LoraFile, folder: Path) -> None:
    processes = [start(score_again_and_again, file.path, folder, first) for first in (0, 1)]
    assert [end_of(process) for process in processes] == [0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ScoreCache(folder).scores(Side.alone(file))[TO_Q].l1 == score_all(file)[TO_Q].l1
    assert not entries(folder, ".part")


def test_a_digest_is_remembered_until_the_file_changes(
    file: LoraFile, folder: Path, hashed: list[Path], tmp_path: Path
) -> None:
    cache = ScoreCache(folder)
    first = cache.sha256(file.path)
    assert cache.sha256(str(file.path)) == ScoreCache(folder).sha256(file.path) == first
    assert len(hashed) == 1
    assert file.sha256 == first
    data = bytearray(file.path.read_bytes())
    data[-1] ^= 1
    times = file.path.stat()
    file.path.write_bytes(data)
    os.utime(file.path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert cache.sha256(file.path) != first


def test_a_file_rewritten_within_a_tick_is_noticed(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "changing.bin"
    digests = set()
    for i in range(5):
        path.write_bytes(bytes([i] * 10))
        digests.add(ScoreCache(folder).sha256(path))
    assert len(digests) == 5


def test_scores_belong_to_the_tensors_that_were_opened(file: LoraFile, folder: Path) -> None:
    cache = ScoreCache(folder)
    replaced = LoraFile.open(file.path)
    other = write_lora(file.path.with_name("other.safetensors"), SHAPES, rank=4, alpha=3.0, seed=99)
    os.replace(other, file.path)
    with pytest.raises(LoraFileError, match="changed while it was in use"):
        cache.scores(Side.alone(replaced))
    now = LoraFile.open(file.path)
    assert cache.scores(Side.alone(now)) == score_all(now)


def test_a_file_deleted_after_opening_is_not_scored(file: LoraFile, folder: Path) -> None:
    file.path.unlink()
    with pytest.raises(LoraFileError, match="does not exist"):
        ScoreCache(folder).scores(Side.alone(file))


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "null byte"])
def test_what_has_no_digest_is_a_file_error(tmp_path: Path, folder: Path, kind: str) -> None:
    path = tmp_path / ("a\0b" if kind == "null byte" else kind)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(LoraFileError) as error:
        ScoreCache(folder).sha256(path)
    assert "\n" not in str(error.value)


def test_a_bad_value_is_reported_and_not_cached(file: LoraFile, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(*_: object) -> FileScores:
        raise LoraValueError(str(file.path), "holds NaN", "use another file", "key")

    monkeypatch.setattr(cache_module, "score_deltas", bad)
    with pytest.raises(LoraValueError):
        ScoreCache(folder).scores(Side.alone(file))
    assert not entries(folder)


def test_the_default_folder_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **__: tmp_path / "user")
    assert ScoreCache().folder == tmp_path / "user"


def test_how_far_the_scoring_is_is_told_where_there_is_some(file: LoraFile, folder: Path) -> None:
    heard: list[tuple[int, int]] = []
    for _ in range(2):
        ScoreCache(folder).scores(Side.alone(file), on_scored=lambda *args: heard.append(args))
        assert heard == [(1, 3), (2, 3), (3, 3)]


def test_an_accelerator_scores_what_it_can_and_the_cpu_the_rest(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, computed: list[set[int]]
) -> None:
    monkeypatch.setattr(cache_module, "scores_on", lambda device: True)
    lora = write_lora(tmp_path / "a.safetensors", {TO_Q: (48, 40), BLOCK + "to_k": (48, 40)}, rank=4)
    lokr = write_lora(tmp_path / "b.safetensors", {BLOCK + "to_v": (48, 40)}, family="lokr", rank=4)
    save_file({**load_file(lora), **load_file(lokr)}, lora)
    file, heard = LoraFile.open(lora), []
    scores = ScoreCache(folder).scores(Side.alone(file), None, torch.device("cpu"), lambda *args: heard.append(args))
    assert len(computed) == 1
    assert heard[-1] == (3, 3)
    expected = score_all(file)
    assert scores.keys() == expected.keys()
    assert all(scores[name].l1 == pytest.approx(expected[name].l1, rel=1e-6) for name in scores)
