"""What files and models are, told by their contents: the same wherever they lie and whenever they were copied."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import klora

_BLOCK, _BLOCKS = 1 << 16, 16
_BESIDE_THE_PICTURE = ("cli.py", "commands", "demo", "evaluation", "report", "webui")
"""What of the package asks for pictures, looks at them or shows them, and does not make them."""


def identity_of(model: str) -> str:
    """Say which model this is: a hub id is its own name; a folder is known by its files.

    Of every file its place, its size and 16 blocks of 64 KiB spread over it count, so that a model of many gigabytes
    is told apart from its finetunes in an instant.
    """
    folder = Path(os.path.expanduser(model))
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        place = path.relative_to(folder)
        # Download tools keep their notes in hidden folders.
        if any(part.startswith(".") for part in place.parts):
            continue
        digest.update(f"{place.as_posix()} {path.stat().st_size}\n".encode())
        digest.update(_samples(path))
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a whole small file, a picture for one."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def code_digest() -> str:
    """A digest of all of this program's code that decides a picture, so that a changed program makes a new one."""
    package = Path(klora.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        if place.parts[0] not in _BESIDE_THE_PICTURE:
            digest.update(place.as_posix().encode() + b"\n" + path.read_bytes())
    return digest.hexdigest()


def _samples(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _BLOCK * _BLOCKS:
            return file.read()
        blocks = []
        for i in range(_BLOCKS):
            file.seek(i * (size - _BLOCK) // (_BLOCKS - 1))
            blocks.append(file.read(_BLOCK))
        return b"".join(blocks)
