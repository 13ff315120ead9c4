"""Files that appear whole or not at all."""

from __future__ import annotations

import secrets
from pathlib import Path


def write_whole(path: Path, data: bytes, prefix: str = ".klora-") -> None:
    """Write beside `path`, then take its place: readers see the old or the new, never a half; OSError as it comes."""
    partial = beside(path.parent, prefix)
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_new(path: Path, data: bytes) -> None:
    """Write beside `path`, then give it that name; FileExistsError where something has it, OSError as it comes."""
    partial = beside(path.parent)
    try:
        partial.write_bytes(data)
        if path.exists():
            raise FileExistsError(path)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def beside(folder: Path, prefix: str = ".klora-") -> Path:
    """A name in `folder` that nothing has."""
    return folder / f"{prefix}{secrets.token_hex(8)}.tmp"
