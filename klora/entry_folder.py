"""A folder of sealed JSON entries within bounds: what is damaged counts as missing, and several processes share it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from klora.atomic import write_whole

T = TypeVar("T")

MAX_FILES = 4096
MAX_ENTRY_BYTES = 64 * 2**20
PART = ".part-"
LEFT_OVER_S = 3600


class EntryFolder:
    """Entries by name, at most `max_bytes` in all, the longest unused dropped first; foreign files are left alone.

    `prefixes` begin the names of all that is written, and so of all that may be deleted. Trouble never stops anything:
    of what is damaged there is a warning each time, of a folder that cannot be written one.
    """

    def __init__(self, path: Path, max_bytes: int, prefixes: tuple[str, ...]) -> None:
        self.path, self.max_bytes = path, max_bytes
        self._prefixes = (*prefixes, PART)
        self._warned = False

    def load(self, name: str, parse: Callable[[Any], T], quiet: bool = False) -> T | None:
        """What `parse` makes of an entry, which becomes the latest used; None where it is not there or no good."""
        entry = self.path / name
        try:
            status = entry.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_ENTRY_BYTES:
                raise ValueError("not a file that the cache has written")
            value = parse(_unseal(entry.read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if not quiet:
                warnings.warn(f"cache entry {entry} is not usable ({error}); computing it anew", stacklevel=4)
            return None
        with contextlib.suppress(OSError):
            os.utime(entry)
        return value

    def save(self, name: str, data: dict[str, Any]) -> None:
        """Write an entry, at once or not at all; one warning where the folder cannot be written."""
        content = _seal(data)
        if len(content) > min(self.max_bytes, MAX_ENTRY_BYTES):
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / name, content, PART)
            self._drop_unused()
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(f"scores cannot be kept in {self.path} ({error}); going on without", stacklevel=4)

    def _drop_unused(self) -> None:
        """Delete what was used longest ago until the rest is within bounds."""
        files = sorted(self._own_files(), key=lambda item: item[1].st_mtime_ns)
        total, count = sum(status.st_size for _, status in files), len(files)
        for path, status in files:
            left_over = path.name.startswith(PART) and time.time() - status.st_mtime > LEFT_OVER_S
            if total > self.max_bytes or count > MAX_FILES or left_over:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                total, count = total - status.st_size, count - 1

    def _own_files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.path.iterdir():
            if path.name.startswith(self._prefixes):
                with contextlib.suppress(FileNotFoundError):
                    yield path, path.lstat()


def _seal(data: dict[str, Any]) -> bytes:
    """JSON whose first member is a checksum of the others, since a flipped digit would still be JSON."""
    body = json.dumps(data, allow_nan=False, separators=(",", ":")).encode()
    return _check(body) + body[1:]


def _unseal(content: bytes) -> Any:
    """The data of `_seal`; ValueError where the content is anything else."""
    body = b"{" + content[len(_check(b"")) :]
    if content != _check(body) + body[1:]:
        raise ValueError("its checksum is wrong")
    return json.loads(body)


def _check(body: bytes) -> bytes:
    return b'{"check":"%s",' % hashlib.sha256(body).hexdigest().encode()
