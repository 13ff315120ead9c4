"""Files that change while they are in use: what was read is one state of the file, and nothing crashes."""

from __future__ import annotations

import faulthandler
import hashlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors import safe_open
from torch import nn

from klora.engine.products import product_of
from klora.engine.site import Site
from klora.errors import LoraFileError
from klora.fusion.scores import score_delta
from klora.lora import disk
from klora.lora.container import TensorFile
from klora.lora.deltas.computed import ProjectedDelta
from klora.lora.file import LoraFile
from tests.support.lora_files import FAMILIES, write_lora
from tests.support.memory import allocates_less_than
from tests.support.processes import end_of, start

NAME = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
SHAPES = {NAME: (64, 64)}


def overwrite(path: Path) -> None:
    """Other bytes, of the same size and date."""
    times = path.stat()
    with open(path, "r+b") as stream:
        stream.seek(-200, os.SEEK_END)
        stream.write(bytes(200))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace(path: Path) -> None:
    times = path.stat()
    other = write_lora(path.with_name("other.safetensors"), SHAPES, seed=7)
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(other, path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: os.truncate(path, 0),
    "truncate": lambda path: os.truncate(path, path.stat().st_size // 2),
    "overwrite": overwrite,
    "replace": replace,
    "delete": lambda path: path.unlink(),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "cat.safetensors", SHAPES)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_after_opening_is_told_as_such(path: Path, change: str) -> None:
    file, tensors = LoraFile.open(path), TensorFile(path)
    delta = file.modules[NAME]
    CHANGES[change](path)
    for read in (
        delta.tensors,
        delta.matrix,
        lambda: file.sha256,
        lambda: file.model_hash,
        lambda: tensors.numbers([]),
    ):
        with pytest.raises(
            LoraFileError, match=r"cat\.safetensors: (changed while it was in use|does not exist); \w+"
        ) as error:
            read()
        assert error.value.cure


@pytest.mark.parametrize("change", ["empty", "truncate", "overwrite"])
@pytest.mark.parametrize("first", [True, False])
def test_a_file_that_changes_while_it_is_read_is_told_as_such(
    path: Path, monkeypatch: pytest.MonkeyPatch, change: str, first: bool
) -> None:
    stored = next(LoraFile.open(path).modules[NAME].stored())
    plain = disk.read_into

    def read(stream: BinaryIO, offset: int, room: memoryview) -> None:
        if first:
            CHANGES[change](path)
        plain(stream, offset, room)
        if not first:
            CHANGES[change](path)

    monkeypatch.setattr(disk, "read_into", read)
    with pytest.raises(LoraFileError, match="changed while it was in use"):
        stored.data()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_applied_no_longer_depends_on_the_file(tmp_path: Path, family: str, change: str) -> None:
    path = write_lora(tmp_path / "cat.safetensors", SHAPES, family=family)
    linear, x = nn.Linear(64, 64), torch.randn(5, 64)
    operand = product_of(LoraFile.open(path).modules[NAME], Site(linear))
    place = (x.device, x.dtype)
    expected = product_of(LoraFile.open(path).modules[NAME], Site(linear)).adder(*place, 1.0)(x, torch.zeros(5, 64))
    CHANGES[change](path)
    for _ in range(2):
        assert operand.adder(*place, 1.0)(x, torch.zeros(5, 64)).equal(expected)
        operand.set_acting(False)


def test_what_a_policy_makes_of_a_delta_holds_the_tensors_of_that_delta(tmp_path: Path) -> None:
    path = write_lora(tmp_path / "cat.safetensors", SHAPES, family="loha")
    source = LoraFile.open(path).modules[NAME]
    common = (source.file, source.key, source.rank, source.alpha, source.scale, source.shape)
    projected = ProjectedDelta(*common, source=source, basis=torch.eye(64)[:, :3], fraction=0.5)
    held = projected.tensors()
    path.unlink()
    expected = source.matrix() @ (torch.eye(64) - 0.5 * torch.diag((torch.arange(64) < 3).float()))
    torch.testing.assert_close(projected.matrix(), expected)
    assert len(held) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_nothing_stays_open_or_mapped(path: Path) -> None:
    def held() -> list[str]:
        opened = [os.path.realpath(f"/proc/self/fd/{entry}") for entry in os.listdir("/proc/self/fd")]
        return [line for line in (*opened, *Path("/proc/self/maps").read_text().splitlines()) if str(path) in line]

    with open(path, "rb"):
        assert held()
    file = LoraFile.open(path)
    assert not held()
    score_delta(file.modules[NAME], [4])
    operand = product_of(file.modules[NAME], Site(nn.Linear(64, 64)))
    operand.source.kept(torch.device("cpu"), torch.float32)
    assert file.sha256
    assert not held()


def test_tensors_are_read_once_while_they_are_held(path: Path) -> None:
    delta = LoraFile.open(path).modules[NAME]
    held = delta.tensors()
    assert all(one is two for one, two in zip(held, delta.tensors(), strict=True))
    path.unlink()
    assert delta.matrix().isfinite().all()
    del held
    with pytest.raises(LoraFileError, match="does not exist"):
        delta.matrix()


def test_a_file_that_is_written_all_the_time_is_never_read_half_and_half(tmp_path: Path) -> None:
    paths = [write_lora(tmp_path / f"{seed}.safetensors", SHAPES, seed=seed) for seed in (0, 1)]
    contents = [path.read_bytes() for path in paths]
    whole = [LoraFile.open(path).modules[NAME].tensors() for path in paths]
    shared = tmp_path / "shared.safetensors"
    shared.write_bytes(contents[0])
    stop = threading.Event()

    def write() -> None:
        for turn in range(10**6):
            with open(shared, "r+b") as stream:
                stream.write(contents[turn % 2])
            if stop.wait(0.03 * (turn % 3)):
                return

    writer = threading.Thread(target=write)
    writer.start()
    outcomes = set()
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        try:
            found = LoraFile.open(shared).modules[NAME].tensors()
        except LoraFileError as error:
            outcomes.add(error.reason)
            continue
        outcomes.add(next(i for i in (0, 1) if all(a.equal(b) for a, b in zip(found, whole[i], strict=True))))
    stop.set()
    writer.join()
    assert outcomes <= {0, 1, "changed while it was in use", "is being written"}
    assert outcomes & {0, 1}


class Slow(io.BytesIO):
    """Gives three bytes at a time, as a network drive may."""

    def readinto(self, room: memoryview) -> int:  # type: ignore[override]
        return super().readinto(room[:3])


def test_what_comes_in_pieces_is_read_to_its_end_or_told_to_be_short() -> None:
    room = bytearray(8)
    disk.read_into(Slow(b"0123456789"), 2, memoryview(room))
    assert room == b"23456789"
    with pytest.raises(EOFError):
        disk.read_into(Slow(b"0123456789"), 3, memoryview(room))


def test_a_file_whose_date_never_settles_is_being_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: os.utime(path))
    os.utime(path)
    with pytest.raises(LoraFileError, match=r"cat\.safetensors: is being written; try again"):
        disk.identity(path)


TICK = disk.CLOCK_TICK_NS


@pytest.mark.parametrize(("age", "waits"), [(-1, []), (0, [0.02]), (TICK - 5_000_000, [0.005]), (TICK, [])])
def test_a_file_is_left_alone_until_a_later_change_must_show_in_its_times(
    path: Path, monkeypatch: pytest.MonkeyPatch, age: int, waits: list[float]
) -> None:
    status, slept = path.stat(), []
    now = max(status.st_mtime_ns, status.st_ctime_ns) + age
    monkeypatch.setattr(time, "time_ns", lambda: now + sum(round(seconds * 1e9) for seconds in slept))
    monkeypatch.setattr(time, "sleep", slept.append)
    disk.identity(path)
    assert slept == waits


def test_the_digest_of_the_tensors_is_of_what_follows_the_header(path: Path) -> None:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert LoraFile.open(path).model_hash == hashlib.sha256(content[start:]).hexdigest()


def read_with_klora(path: Path) -> None:
    use_after_cut(path, LoraFile.open(path).modules[NAME].tensors())


def read_with_the_package(path: Path) -> None:
    with safe_open(str(path), "pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
    use_after_cut(path, tensors)


def use_after_cut(path: Path, tensors: Iterable[torch.Tensor]) -> None:
    faulthandler.disable()  # a death that is expected needs no traceback
    os.truncate(path, 0)
    print(sum(float(tensor.sum()) for tensor in tensors))


@pytest.mark.skipif(sys.platform != "linux", reason="only known of Linux")
def test_the_safetensors_package_maps_files_and_so_dies_where_this_does_not(tmp_path: Path) -> None:
    """Why `lora/` reads files itself: should this fail, read docs/architecture.md again."""
    shapes = {NAME: (512, 512)}
    for read, code in ((read_with_klora, 0), (read_with_the_package, -signal.SIGBUS)):
        path = write_lora(tmp_path / f"{read.__name__}.safetensors", shapes)
        assert end_of(start(read, path)) == code


def test_an_identity_is_all_that_a_system_tells_of_a_change(path: Path) -> None:
    status = path.stat()
    assert disk.identity(path) == (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def test_a_digest_never_holds_the_whole_file(tmp_path: Path) -> None:
    large = tmp_path / "large.safetensors"
    large.write_bytes(bytes(2**24))
    with allocates_less_than(2**23):
        digest = disk.sha256(large)
    assert digest == hashlib.sha256(bytes(2**24)).hexdigest()
