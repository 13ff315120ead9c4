"""What has been done, on disk: each picture with all that made it, and beside it its scores, each written whole.

A picture is known by the digest of everything that decides it, so that a run which is stopped goes on where it was,
and a changed setting, file, model or library makes a new picture instead of passing for an old one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klora.generation.generate import GeneratedPicture
from klora.generation.methods import slug
from klora.generation.picture_file import write_picture
from klora.report.files import OutputFile

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Record:
    """One picture's results. `seconds` is what the pipeline took for it, `forwards` its denoiser's runs per step."""

    method: str
    subject: str
    style: str
    seed: int
    seconds: float
    forwards: float
    scores: Mapping[str, float]
    picture: str


def digest_of(facts: Mapping[str, Any]) -> str:
    """The sha256 of facts, whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class PictureFiles:
    """Where one picture and its scores lie; `key` is the digest of what decides the picture."""

    folder: Path
    method: str
    subject: str
    style: str
    seed: int
    key: str

    @property
    def picture(self) -> Path:
        """The picture's file. The start of its key is in the name: one folder may hold several evaluations."""
        name = f"{slug(self.subject)}--{slug(self.style)}--{self.seed}-{self.key[:12]}.png"
        return self.folder / "pictures" / slug(self.method) / name

    def read_picture(self) -> tuple[Image, dict[str, Any]] | None:
        """The picture and what is known of its making, where it is there and whole."""
        from PIL import Image as Images

        try:
            with Images.open(self.picture) as image:
                image.load()
                facts = json.loads(image.info["klora"])
                return (image.convert("RGB"), facts) if facts["key"] == self.key else None
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None

    def write_picture(self, generated: GeneratedPicture) -> tuple[Image, dict[str, Any]]:
        """Write a new picture, whole or not at all; gives what `read_picture` would."""
        cost = {"seconds": generated.seconds, "forwards_per_step": generated.forwards}
        facts = {**generated.facts, "key": self.key, **cost}
        self.picture.parent.mkdir(parents=True, exist_ok=True)
        write_picture(generated.image, self.picture, facts)
        return generated.image.convert("RGB"), facts

    def read_record(self, scorer: str) -> Record | None:
        """The results, where they are there and of this picture and this `scorer` (its key)."""
        try:
            found = json.loads(self._scores.read_text(encoding="utf-8"))
            fits = (found["key"], found["scorer"]) == (self.key, scorer)
            return Record(**found["record"]) if fits else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_record(self, scorer: str, facts: Mapping[str, Any], scores: Mapping[str, float]) -> Record:
        """Write the results, whole or not at all."""
        record = Record(
            self.method,
            self.subject,
            self.style,
            self.seed,
            facts["seconds"],
            facts["forwards_per_step"],
            scores,
            self.picture.relative_to(self.folder).as_posix(),
        )
        text = json.dumps({"key": self.key, "scorer": scorer, "record": asdict(record)}, indent=1)
        OutputFile.check(self._scores).write(f"{text}\n".encode())
        return record

    @property
    def _scores(self) -> Path:
        return self.picture.with_suffix(".json")
