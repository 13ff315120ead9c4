"""Output files: checked before the work that fills them, written whole or not at all."""

from __future__ import annotations

import csv
import io
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from klora.atomic import beside, write_whole
from klora.errors import KloraError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class OutputFile:
    """A file that can be written; `special` is one that cannot be replaced, such as a pipe or /dev/null."""

    path: Path
    special: bool = False

    @classmethod
    def check(cls, given: str | Path, inputs: Iterable[str | Path] = ()) -> OutputFile:
        """Raise KloraError where `given` cannot be written, or is one of the files that are read."""
        path = Path(given)
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            mode = None
        except OSError as error:
            raise _unwritable(path, error) from None
        if mode is not None and stat.S_ISDIR(mode):
            raise KloraError(f"{path}: is a folder; name a file")
        if mode is not None and not stat.S_ISREG(mode):
            return cls(path, special=True)
        if mode is not None and any(_same(path, other) for other in inputs):
            raise KloraError(f"{path}: is read and would be overwritten; name another file")
        # Behind a symbolic link, the file is replaced and the link stays.
        file = cls(Path(os.path.realpath(path)))
        if not file.path.parent.is_dir():
            raise KloraError(f"{path}: there is no folder {file.path.parent}; make it first")
        _probe(file.path.parent, path)
        return file

    def write(self, data: bytes) -> None:
        """Write `data`; KloraError where that fails, and then what was there before is still there."""
        try:
            if self.special:
                self.path.write_bytes(data)
            else:
                write_whole(self.path, data)
        except OSError as error:
            raise _unwritable(self.path, error) from None


def output_folder(given: str | Path) -> Path:
    """Make a folder to write into, parents included; KloraError where that is impossible."""
    folder = Path(given)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise KloraError(f"{folder}: is a file; name a folder") from None
    except OSError as error:
        raise _unwritable(folder, error) from None
    _probe(folder, folder)
    return folder


def png_bytes(image: Image, texts: Mapping[str, str] | None = None) -> bytes:
    """A picture as the bytes of a PNG with `texts` in it, by keyword."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for keyword, text in (texts or {}).items():
        # A file's name may hold bytes that are no text.
        info.add_text(keyword, text.encode(errors="backslashreplace").decode())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def csv_bytes(lines: Iterable[Sequence[str]]) -> bytes:
    """Lines as the bytes of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


def _probe(folder: Path, given: Path) -> None:
    """Find out whether files can be made in `folder`; permissions alone do not tell."""
    probe = beside(folder)
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise _unwritable(given, error) from None


def _same(path: Path, other: str | Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:
        return False


def _unwritable(path: Path, error: OSError) -> KloraError:
    return KloraError(f"{path}: cannot be written ({error.strerror or error}); choose another place")
