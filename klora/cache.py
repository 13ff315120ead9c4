"""Scores on disk: a file is scored once, and the next time not even read. The only place that writes scores."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klora.entry_folder import EntryFolder
from klora.fusion.device_scores import is_low_rank, score_low_rank, scores_on
from klora.fusion.interference import INTERFERENCE_VERSION, Interference, interferences
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
from klora.lora.side import Side

if TYPE_CHECKING:
    import torch

MAX_SPECIAL_KS = 32
SCORES, DIGEST, OVERLAP = "scores-", "digest-", "overlap-"

Interferences = dict[str, Interference | None]


class ScoreCache:
    """Scores and digests of LoRA files, and what pairs have in common, in a folder of at most `max_bytes`.

    `folder` is the user's cache directory unless given; what was used longest ago is dropped first. Trouble with the
    cache never stops anything: what is damaged is computed anew with a warning, and where nothing can be written there
    is one warning. Processes may share it: entries appear whole or not at all.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, max_bytes: int = 256 * 2**20) -> None:
        path = Path(folder) if folder is not None else _user_folder()
        self._entries = EntryFolder(path, max_bytes, (SCORES, DIGEST, OVERLAP))

    @property
    def folder(self) -> Path:
        """Where the entries lie."""
        return self._entries.path

    @property
    def max_bytes(self) -> int:
        """What they take at most."""
        return self._entries.max_bytes

    def scores(
        self,
        side: Side,
        wanted: Mapping[str, Collection[int]] | None = None,
        device: torch.device | None = None,
        on_scored: OnScored | None = None,
    ) -> FileScores:
        """Scores of the diffusion-model modules of a side that are `wanted`, at the standard K and those given by name.

        Without `wanted`, of all modules. Read from disk where they are there; what is missing is computed, on `device`
        where that is an accelerator, and added; `on_scored` is told how far it is. Scores of a single file are kept
        without its weight. Raises LoraValueError for NaN or infinity anywhere in the files.
        """
        wanted = dict.fromkeys(side.modules, ()) if wanted is None else wanted
        match side.acting:
            case ():
                return {}
            case (only,):
                scores = self._scores(Side.alone(only.lora), wanted, device, on_scored)
                return {name: score.times(only.weight) for name, score in scores.items()}
        return self._scores(side, wanted, device, on_scored)

    def _scores(
        self,
        side: Side,
        wanted: Mapping[str, Collection[int]],
        device: torch.device | None,
        on_scored: OnScored | None,
    ) -> FileScores:
        key = self._key(side)
        stored = self._load_scores(key, side)
        # Whatever is kept was looked at as a whole before.
        if stored:
            side.know_finite()
        new = _compute(_missing(side, stored, wanted), device, on_scored)
        scores = {
            name: _merge(stored.get(name), new[name]) if name in new else stored[name]
            for name in side.modules
            if name in wanted
        }
        side.check_finite(scores)
        if new:
            self._save_scores(key, side, scores)
        return scores

    def interferences(
        self, subject: Side, style: Side, names: Iterable[str], on_compared: OnScored | None = None
    ) -> Interferences:
        """What the deltas of two sides have in common in the modules of these `names`, which both have.

        Read from disk where it is there; what is missing is computed and added; `on_compared` is told how far it is.
        """
        keys = [self._key(side) for side in (subject, style)]
        entry = f"{OVERLAP}{hashlib.sha256(' '.join(keys).encode()).hexdigest()}-v{INTERFERENCE_VERSION}.json"
        stored = self._entries.load(entry, lambda data: _parse_interferences(data, keys)) or {}
        names = list(names)
        new = interferences({n: (subject.modules[n], style.modules[n]) for n in names if n not in stored}, on_compared)
        found = stored | new
        if new:
            self._entries.save(entry, {"version": INTERFERENCE_VERSION, "files": keys, "modules": found})
        return {name: found[name] for name in names}

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
        entry = f"{DIGEST}{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"
        known = self._entries.load(entry, _parse_digest)
        if known and known[0] == identity:
            return known[1]
        digest = disk.sha256(path, identity)
        self._entries.save(entry, {"identity": identity, "sha256": digest})
        return digest

    def _key(self, side: Side) -> str:
        """What a side is known by: of one file with the weight 1 its digest, and how it is named if not by itself."""
        parts = [(_named_digest(self.digest(lora), lora.naming), weight) for lora, weight in side.acting]
        if len(parts) == 1 and parts[0][1] == 1:
            return parts[0][0]
        return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()

    def _load_scores(self, key: str, side: Side, quiet: bool = False) -> FileScores:
        """The stored scores, or nothing where there are none or they are not of this side."""
        return self._entries.load(_scores_entry(key), lambda data: _parse_scores(data, key, side), quiet) or {}

    def _save_scores(self, key: str, side: Side, scores: FileScores) -> None:
        # Another process may have added its own K in the meantime, and other modules may have been scored before.
        others = self._load_scores(key, side, quiet=True)
        merged = others | {name: _limit(_merge(others.get(name), score)) for name, score in scores.items()}
        modules = {name: vars(score) for name, score in merged.items()}
        data = {"version": SCORING_VERSION, "sha256": _digest_of(key), "modules": modules}
        self._entries.save(_scores_entry(key), data)


def _user_folder() -> Path:
    # Not in a WebUI's environment, which names the folder instead.
    import platformdirs

    return platformdirs.user_cache_path("klora", appauthor=False)


def _named_digest(digest: str, naming: str) -> str:
    # Under the names of a model at hand, a file of an unknown architecture has other modules.
    return f"{digest}-{naming}" if naming else digest


def _digest_of(key: str) -> str:
    return key.partition("-")[0]


def _scores_entry(key: str) -> str:
    return f"{SCORES}{key}-v{SCORING_VERSION}.json"


def _parse_scores(data: Any, key: str, side: Side) -> FileScores:
    """The scores of an entry; ValueError, TypeError or KeyError where it is not one of this version and side."""
    if data["version"] != SCORING_VERSION or data["sha256"] != _digest_of(key):
        raise ValueError("it belongs to another version or file")
    scores = {name: _parse_module(module) for name, module in data["modules"].items()}
    for name, score in scores.items():
        delta = side.modules[name]
        if (score.shape, score.rank, score.alpha) != (tuple(delta.shape), delta.rank, float(delta.alpha)):
            raise ValueError("its modules are not those of the file")
    return scores


def _parse_interferences(data: Any, keys: list[str]) -> Interferences:
    """What an entry says of two files; ValueError, TypeError or KeyError where it is not of this version and them."""
    if data["version"] != INTERFERENCE_VERSION or data["files"] != keys:
        raise ValueError("it belongs to another version or to other files")
    found = {name: values and Interference(*values) for name, values in data["modules"].items()}
    if not all(math.isfinite(value) for one in found.values() if one for value in one):
        raise ValueError("it holds impossible numbers")
    return found


def _parse_module(data: Any) -> ModuleScore:
    sums = {int(k): float(s) for k, s in data["sums"].items()}
    score = ModuleScore(tuple(data["shape"]), data["rank"], data["alpha"], data["l1"], data["fro2"], sums)
    if not all(0 <= value < math.inf for value in (score.l1, score.fro2, *sums.values())):
        raise ValueError("it holds impossible scores")
    return score


def _missing(side: Side, stored: FileScores, wanted: Mapping[str, Collection[int]]) -> Wanted:
    """The wanted modules of a side, each with those of the standard K and its own that are not stored."""
    missing = {}
    for name, delta in side.modules.items():
        known = stored[name].sums.keys() if name in stored else set()
        if name in wanted and (ks := {*standard_ks(delta.rank), *wanted[name]} - known):
            missing[name] = delta, ks
    return missing


def _compute(missing: Wanted, device: torch.device | None, on_scored: OnScored | None) -> FileScores:
    """The scores of modules, on `device` as far as that is an accelerator and can do them."""
    if device is None or not scores_on(device):
        return score_deltas(missing, on_scored)
    there = {name: item for name, item in missing.items() if is_low_rank(item[0])}
    here = {name: item for name, item in missing.items() if name not in there}
    done = len(there)
    first = score_low_rank(there, device, on_scored and (lambda count, _: on_scored(count, len(missing))))
    return first | score_deltas(here, on_scored and (lambda count, _: on_scored(done + count, len(missing))))


def _merge(known: ModuleScore | None, new: ModuleScore) -> ModuleScore:
    """Both scores' sums in one."""
    if known is None:
        return new
    return replace(known, l1=max(known.l1, new.l1), sums=known.sums | new.sums)


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
