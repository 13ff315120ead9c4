"""Scores on disk: a file is scored once, and the next time not even read. The only place that writes scores."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import stat
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from klora.atomic import write_whole
from klora.fusion.device_scores import is_low_rank, score_low_rank, scores_on
from klora.fusion.scores import (
    SCORING_VERSION,
    FileScores,
    ModuleScore,
    OnScored,
    Wanted,
    score_deltas,
    standard_ks,
)
from klora.lora import disk
from klora.lora.file import LoraFile

T = TypeVar("T")

MAX_FILES = 4096
MAX_ENTRY_BYTES = 64 * 2**20
MAX_SPECIAL_KS = 32
# The names of all that the cache writes, and so of all that it may delete.
SCORES, DIGEST, PART = "scores-", "digest-", ".part-"
LEFT_OVER_S = 3600


class ScoreCache:
    """Scores and digests of LoRA files in a folder, at most `max_bytes` in all, the longest unused dropped first.

    `folder` is the user's cache directory unless given. Trouble with the cache never stops anything: what is damaged
    is computed anew with a warning, and where nothing can be written there is one warning. Processes may share it:
    entries appear whole or not at all.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, max_bytes: int = 256 * 2**20) -> None:
        self.folder = Path(folder) if folder is not None else _user_folder()
        self.max_bytes = max_bytes
        self._warned = False

    def scores(
        self,
        file: LoraFile,
        wanted: Mapping[str, Collection[int]] | None = None,
        device: torch.device | None = None,
        on_scored: OnScored | None = None,
    ) -> FileScores:
        """Scores of all diffusion-model modules of `file`, at the standard K and those `wanted` by module name.

        Read from disk where they are there; what is missing is computed, on `device` where that is an accelerator, and
        added; `on_scored` is told how far it is. Raises LoraValueError for NaN or infinity anywhere in the file.
        """
        wanted = wanted or {}
        digest = self.digest(file)
        stored = self._load_scores(digest, file)
        # Whatever is kept was looked at as a whole before.
        if stored:
            file.know_finite()
        scores = _complete(file, stored, wanted, device, on_scored)
        file.check_finite(scored=True)
        if scores != stored:
            self._save_scores(digest, file, scores)
        return scores

    def sha256(self, path: str | os.PathLike[str]) -> str:
        """Hex digest of a file, remembered by path, size, times and inode, so that it is read only once.

        Raises LoraFileError where there is no such file or it cannot be read.
        """
        path = Path(os.path.abspath(path))
        return self._digest(path, disk.identity(path))

    def digest(self, file: LoraFile) -> str:
        """Hex digest of an opened LoRA, remembered as that of a file is; LoraFileError where it has changed since."""
        if file.path is None or not isinstance(file.identity, disk.Identity):
            return file.sha256
        return self._digest(Path(os.path.abspath(file.path)), file.identity)

    def _digest(self, path: Path, identity: disk.Identity) -> str:
        """The digest of the file that had this identity; LoraFileError where it is not known and the file changed."""
        known = self._load(self._digest_entry(path), _parse_digest)
        if known and known[0] == identity:
            return known[1]
        digest = disk.sha256(path, identity)
        self._save(self._digest_entry(path), {"identity": identity, "sha256": digest})
        return digest

    def _load_scores(self, digest: str, file: LoraFile, quiet: bool = False) -> FileScores:
        """The stored scores, or nothing where there are none or they are not of this file."""
        return self._load(self._scores_entry(digest, file), lambda data: _parse_scores(data, digest, file), quiet) or {}

    def _save_scores(self, digest: str, file: LoraFile, scores: FileScores) -> None:
        # Another process may have added its own K in the meantime.
        others = self._load_scores(digest, file, quiet=True)
        modules = {name: vars(_limit(_merge(others.get(name), score))) for name, score in scores.items()}
        self._save(self._scores_entry(digest, file), {"version": SCORING_VERSION, "sha256": digest, "modules": modules})

    def _scores_entry(self, digest: str, file: LoraFile) -> Path:
        # Under the names of a model at hand, a file of an unknown architecture has other modules.
        naming = f"-{file.naming}" if file.naming else ""
        return self.folder / f"{SCORES}{digest}{naming}-v{SCORING_VERSION}.json"

    def _digest_entry(self, path: Path) -> Path:
        return self.folder / f"{DIGEST}{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"

    def _load(self, entry: Path, parse: Callable[[Any], T], quiet: bool = False) -> T | None:
        """What `parse` makes of an entry, which becomes the latest used; None where it is not there or no good."""
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

    def _save(self, entry: Path, data: dict[str, Any]) -> None:
        """Write an entry, at once or not at all; one warning where the folder cannot be written."""
        content = _seal(data)
        if len(content) > min(self.max_bytes, MAX_ENTRY_BYTES):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(entry, content, PART)
            self._drop_unused()
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(f"scores cannot be kept in {self.folder} ({error}); going on without", stacklevel=4)

    def _drop_unused(self) -> None:
        """Delete what was used longest ago until the rest is within bounds."""
        files = sorted(_own_files(self.folder), key=lambda item: item[1].st_mtime_ns)
        total, count = sum(status.st_size for _, status in files), len(files)
        for path, status in files:
            left_over = path.name.startswith(PART) and time.time() - status.st_mtime > LEFT_OVER_S
            if total > self.max_bytes or count > MAX_FILES or left_over:
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
                total, count = total - status.st_size, count - 1


def _user_folder() -> Path:
    # Not in a WebUI's environment, which names the folder instead.
    import platformdirs

    return platformdirs.user_cache_path("klora", appauthor=False)


def _own_files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.iterdir():
        if path.name.startswith((SCORES, DIGEST, PART)):
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


def _parse_scores(data: Any, digest: str, file: LoraFile) -> FileScores:
    """The scores of an entry; ValueError, TypeError or KeyError where it is not one of this version and file."""
    if data["version"] != SCORING_VERSION or data["sha256"] != digest:
        raise ValueError("it belongs to another version or file")
    scores = {name: _parse_module(module) for name, module in data["modules"].items()}
    described = {name: (score.shape, score.rank, score.alpha) for name, score in scores.items()}
    if described != {name: (tuple(d.shape), d.rank, float(d.alpha)) for name, d in file.modules.items()}:
        raise ValueError("its modules are not those of the file")
    return {name: scores[name] for name in file.modules}


def _parse_module(data: Any) -> ModuleScore:
    sums = {int(k): float(s) for k, s in data["sums"].items()}
    score = ModuleScore(tuple(data["shape"]), data["rank"], data["alpha"], data["l1"], data["fro2"], sums)
    if not all(0 <= value < math.inf for value in (score.l1, score.fro2, *sums.values())):
        raise ValueError("it holds impossible scores")
    return score


def _complete(
    file: LoraFile,
    stored: FileScores,
    wanted: Mapping[str, Collection[int]],
    device: torch.device | None,
    on_scored: OnScored | None,
) -> FileScores:
    """The scores of all modules, each with the standard K and its wanted ones; computed only where not stored."""
    missing = {}
    for name, delta in file.modules.items():
        known = stored[name].sums.keys() if stored else set()
        if ks := {*standard_ks(delta.rank), *wanted.get(name, ())} - known:
            missing[name] = delta, ks
    new = _compute(missing, device, on_scored)
    return {name: _merge(stored.get(name), new[name]) if name in new else stored[name] for name in file.modules}


def _compute(missing: Wanted, device: torch.device | None, on_scored: OnScored | None) -> FileScores:
    """The scores of modules, on `device` as far as that is an accelerator and can do them."""
    if device is None or not scores_on(device):
        return score_deltas(missing, on_scored)
    there = {name: item for name, item in missing.items() if is_low_rank(item[0])}
    here = {name: item for name, item in missing.items() if name not in there}
    done = len(there)
    first = score_low_rank(there, device, on_scored and (lambda count, _: on_scored(count, len(missing))))
    return first | score_deltas(here, on_scored and (lambda count, _: on_scored(done + count, len(missing))))


def _merge(known: ModuleScore | None, score: ModuleScore) -> ModuleScore:
    """Both scores' sums in one."""
    if known is None:
        return score
    return replace(known, l1=max(known.l1, score.l1), sums=known.sums | score.sums)


def _limit(score: ModuleScore) -> ModuleScore:
    """Of the sums at no standard K, only the latest."""
    standard = standard_ks(score.rank)
    special = [k for k in score.sums if k not in standard]
    dropped = special[:-MAX_SPECIAL_KS]
    return replace(score, sums={k: s for k, s in score.sums.items() if k not in dropped})


def _parse_digest(data: Any) -> tuple[disk.Identity, str]:
    if not re.fullmatch("[0-9a-f]{64}", data["sha256"]):
        raise ValueError("it holds no digest")
    return disk.Identity(*data["identity"]), data["sha256"]
