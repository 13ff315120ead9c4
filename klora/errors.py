"""Every error a user can meet: one line that says what is wrong, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from klora.text import one_line, printable


class KloraError(Exception):
    """Base of all errors raised on purpose; its text is one line meant for the user."""


class SettingsError(KloraError):
    """A setting has an impossible value."""

    def __init__(self, field: str, reason: str) -> None:
        reason = one_line(reason)
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class LoraFileError(KloraError):
    """A LoRA file cannot be read or understood.

    Attributes: `file` (its path), `key` (the tensor or module at fault, if one is), `reason`, `cure`; all printable.
    """

    def __init__(self, file: str, reason: str, cure: str, key: str | None = None) -> None:
        file, key = printable(file), key and printable(key)
        where = f"{file}: {key}" if key else file
        super().__init__(f"{where}: {one_line(f'{reason}; {cure}')}")
        self.file = file
        self.key = key
        self.reason = reason
        self.cure = cure


class LoraValueError(LoraFileError):
    """A tensor holds NaN or infinity."""


class UnsupportedFormatError(LoraFileError):
    """A file of a kind that K-LoRA does not fuse (OFT, BOFT, GLoRA, IA3, pickles)."""


class MismatchError(KloraError):
    """Two files, or a file and a model, do not belong together."""


class LeftOutWarning(UserWarning):
    """Something of a LoRA does nothing: it found no place in the model, or has rank 0."""


def by_name(text: str, *files: Path) -> str:
    """A text with the names of `files` in the place of their paths."""
    for path in files:
        for written in (str(path), printable(str(path))):
            text = text.replace(written, printable(path.name))
    return text


@contextmanager
def named_by(*files: Path, folder: Path | None = None) -> Iterator[None]:
    """Let errors about files say their names alone: what others see must not tell where they lie on this machine."""
    try:
        yield
    except KloraError as error:
        text = by_name(str(error), *files)
        if folder is not None:
            text = text.replace(f"{folder.resolve()}/", "").replace(str(folder.resolve()), folder.name)
        error.args = (text,)
        raise
