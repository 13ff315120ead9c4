"""Shares that were found, kept on disk for the next time."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from klora.atomic import write_whole

NAME = "found-shares.json"
MAX_SHARES = 1000


@dataclass(frozen=True)
class Found:
    """What a share is found for: the digests of both files, and the checkpoint's digest or name."""

    subject: str
    style: str
    checkpoint: str

    @property
    def key(self) -> str:
        """One text for all three."""
        return f"{self.subject} {self.style} {self.checkpoint}"


class FoundShares:
    """The shares found last, at most MAX_SHARES, in a file of a folder; where it cannot be written, none are kept."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / NAME

    def get(self, found: Found) -> float | None:
        """The share that was found; None where there is none."""
        return self._read().get(found.key)

    def keep(self, found: Found, share: float) -> None:
        """Keep a share as the latest."""
        known = self._read()
        known.pop(found.key, None)
        known[found.key] = share
        lines = dict(list(known.items())[-MAX_SHARES:])
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, json.dumps(lines, indent=0).encode())

    def _read(self) -> dict[str, float]:
        """What is there and good; a damaged file holds nothing."""
        try:
            data = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(data, dict):
            return {}
        return {key: value for key, value in data.items() if isinstance(value, float) and 0 <= value <= 1}
