"""Reading a file that somebody else may write to, replace or delete at the same time.

Nothing stays open or mapped: a mapped file that is truncated ends the process, and on Windows it can be neither
replaced nor deleted. What was read belongs to one state of the file, told by its identity, or there is an error.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from klora.errors import LoraFileError
from klora.text import printable

# Times of files have the grain of the system's clock: a second change within one tick does not show in them.
CLOCK_TICK_NS = 20_000_000
_TRIES = 10


class Identity(NamedTuple):
    """What is different once a file has been written to or replaced, even by one of the same size and date."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def identity(path: Path) -> Identity:
    """The identity of the file at `path`; LoraFileError where there is none or it is being written."""
    try:
        return _settled(path, path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


@contextmanager
def reading(path: Path, known: Identity | None = None) -> Iterator[tuple[BinaryIO, Identity]]:
    """Open a regular file, which must stay as it is until the end; where `known` is given, be as it was then.

    Gives the stream, unbuffered, and the identity. Raises LoraFileError also for what fails inside.
    """
    try:
        _check_regular(path)
        with open(path, "rb", buffering=0) as stream:
            found = _settled(stream.fileno(), path)
            if known not in (None, found):
                raise _changed(path)
            yield stream, found
            if _settled(stream.fileno(), path) != found:
                raise _changed(path)
    except EOFError:
        raise _changed(path) from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def check_readable(path: Path) -> None:
    """LoraFileError where there is no regular file, or none that may be read."""
    with reading(path):
        pass


def read_into(stream: BinaryIO, offset: int, room: memoryview) -> None:
    """Fill `room` with the bytes from `offset` on; EOFError where there are not so many."""
    stream.seek(offset)
    while room:
        count = stream.readinto(room)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        room = room[count:]


def sha256(path: Path, known: Identity | None = None, start: int = 0) -> str:
    """Hex digest of a file from byte `start` on, as it was when `known` was taken; LoraFileError where it is not."""
    digest = hashlib.sha256()
    with reading(path, known) as (stream, _):
        stream.seek(start)
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _settled(file: Path | int, path: Path) -> Identity:
    """The identity of a path or descriptor, once its times are so old that a later change must show in them."""
    for _ in range(_TRIES):
        status = os.stat(file)
        age = time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns)
        if not 0 <= age < CLOCK_TICK_NS:
            return Identity(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        time.sleep((CLOCK_TICK_NS - age) / 1e9)
    raise LoraFileError(str(path), "is being written", "try again once it is complete")


def _check_regular(path: Path) -> None:
    """A pipe or device is refused before it is opened, since reading it may block."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise LoraFileError(str(path), "is a folder", "give the .safetensors file inside it")
    if not stat.S_ISREG(mode):
        raise LoraFileError(str(path), "is a device, pipe or socket", "give a .safetensors file")


def _changed(path: Path) -> LoraFileError:
    return LoraFileError(str(path), "changed while it was in use", "start again with the file as it is now")


def _unreadable(path: Path, error: Exception) -> LoraFileError:
    if isinstance(error, FileNotFoundError):
        return LoraFileError(str(path), "does not exist", "check the path")
    reason = getattr(error, "strerror", None) or printable(str(error))
    return LoraFileError(str(path), f"cannot be read ({reason})", "check the path and its permissions")
