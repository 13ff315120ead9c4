"""What is evaluated: subjects and styles with their LoRAs, reference pictures and words, and which are paired."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klora.errors import KloraError, SettingsError
from klora.lora.weighted import check_weight, split_weight
from klora.vision import IMAGE_SUFFIXES

TEMPLATE = "{subject} {style}"
TEACH = "teach"
"""The folder beside the reference pictures of those that only reference guidance looks at."""
LORAS = "loras.txt"
"""The file in a concept's folder that lists its LoRAs where there are several, as the command line has them."""
_PLAIN = {"subjects": "a {}", "styles": "in {} style"}
"""The words of what is given none, made of its name."""
_LAYOUT = "subjects/NAME and styles/NAME, each with a .safetensors LoRA and reference pictures"


@dataclass(frozen=True)
class Concept:
    """A subject or a style."""

    name: str
    lora: Path | tuple[tuple[Path, float], ...]
    """The file; or several, each with its weight."""
    words: str
    references: tuple[Path, ...] = ()
    teachers: tuple[Path, ...] = ()
    """Pictures that only reference guidance looks at, where some are kept apart for them."""


@dataclass(frozen=True)
class StudyPair:
    """A subject and a style to be fused, and what to generate with them."""

    subject: Concept
    style: Concept
    prompt: str

    @property
    def name(self) -> str:
        """How people call the pair."""
        return f"{self.subject.name} × {self.style.name}"


def read_study(given: str | Path, template: str = TEMPLATE) -> tuple[StudyPair, ...]:
    """Read a folder of the layout, or a JSON file that names everything; KloraError naming what is missing.

    In `template`, {subject} and {style} stand for the words of each. Without a list of pairs, all are paired.
    """
    path = Path(given)
    if path.is_dir():
        subjects, styles = (_read_folder(path / kind, plain) for kind, plain in _PLAIN.items())
        names: Sequence[tuple[str, str]] = tuple(itertools.product(subjects, styles))
    else:
        subjects, styles, names = _read_manifest(path)
    return tuple(_pair(subjects[a], styles[b], template) for a, b in names)


def draw_pairs(pairs: Sequence[StudyPair], count: int, seed: int) -> tuple[StudyPair, ...]:
    """Draw `count` pairs by `seed`, in their order; KloraError where there are fewer (K-LoRA's Table 1 has 18)."""
    if count > len(pairs):
        raise KloraError(f"--pairs: the study has {len(pairs)} pairs, fewer than {count}; add subjects or styles")
    drawn = random.Random(seed).sample(range(len(pairs)), count)
    return tuple(pairs[i] for i in sorted(drawn))


def _pair(subject: Concept, style: Concept, template: str) -> StudyPair:
    prompt = template.replace("{subject}", subject.words).replace("{style}", style.words)
    return StudyPair(subject, style, prompt)


def _read_folder(folder: Path, plain: str) -> dict[str, Concept]:
    if not folder.is_dir():
        raise KloraError(f"{folder.parent}: has no folder {folder.name}; it takes {_LAYOUT}")
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not inside:
        raise KloraError(f"{folder}: is empty; it takes one folder for each of its {folder.name}")
    return {path.name: _read_concept(path, plain) for path in inside}


def _read_concept(folder: Path, plain: str) -> Concept:
    words = folder / "prompt.txt"
    text = " ".join(_read_text(words).split()) if words.is_file() else ""
    references = _pictures(folder)
    if not references:
        raise KloraError(f"{folder}: has no reference pictures; put some there ({', '.join(IMAGE_SUFFIXES)})")
    lora, text = _lora_of(folder), text or plain.format(_spaced(folder.name))
    return Concept(folder.name, lora, text, references, _pictures(folder / TEACH))


def _pictures(folder: Path) -> tuple[Path, ...]:
    found = folder.iterdir() if folder.is_dir() else ()
    return tuple(sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES))


def _lora_of(folder: Path) -> Path | tuple[tuple[Path, float], ...]:
    if (listed := folder / LORAS).is_file():
        return _several(folder, listed)
    usual = folder / "lora.safetensors"
    files = [usual] if usual.is_file() else sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        found = "no .safetensors file" if not files else f"{len(files)} .safetensors files"
        raise KloraError(f"{folder}: has {found}; name the one to use lora.safetensors, or list several in {LORAS}")
    return files[0]


def _several(folder: Path, listed: Path) -> tuple[tuple[Path, float], ...]:
    lines = [line.strip() for line in _read_text(listed).splitlines() if line.strip()]
    if not lines:
        raise KloraError(f"{listed}: is empty; write FILE or FILE:WEIGHT on each line")
    try:
        found = [split_weight(line, "weight", folder) for line in lines]
    except SettingsError as error:
        raise KloraError(f"{listed}: {error}") from None
    return tuple((folder / file, weight) for file, weight in found)


def _spaced(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise KloraError(f"{path}: there is no such file or folder; give a folder with {_LAYOUT}") from None
    except UnicodeDecodeError:
        raise KloraError(f"{path}: is not text in UTF-8; save it as such") from None


def _read_manifest(path: Path) -> tuple[dict[str, Concept], dict[str, Concept], Sequence[tuple[str, str]]]:
    text = _read_text(path)
    try:
        found = json.loads(text)
        subjects, styles = (
            {name: _listed(path, name, entry, plain) for name, entry in found[kind].items()}
            for kind, plain in _PLAIN.items()
        )
        names = [(str(a), str(b)) for a, b in found.get("pairs", itertools.product(subjects, styles))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise KloraError(f"{path}: is not the JSON of an evaluation ({detail}); see docs/evaluate.md") from None
    for pair in names:
        for name, known in zip(pair, (subjects, styles), strict=True):
            if name not in known:
                raise KloraError(f"{path}: pairs: {name!r} is not among {', '.join(known)}")
    if not names:
        raise KloraError(f"{path}: names no pairs; give at least one subject and one style")
    return subjects, styles, names


def _listed(manifest: Path, name: str, entry: Mapping[str, Any], plain: str) -> Concept:
    references = tuple(manifest.parent / str(file) for file in entry["references"])
    for file in (*references, *(manifest.parent / str(file) for file in entry.get("teachers", ()))):
        if not file.is_file():
            raise KloraError(f"{manifest}: {name}: there is no picture {file}; correct its references")
    if not references:
        raise KloraError(f"{manifest}: {name}: has no references; name at least one picture")
    words = str(entry.get("prompt") or plain.format(_spaced(name)))
    teachers = tuple(manifest.parent / str(file) for file in entry.get("teachers", ()))
    return Concept(name, _listed_loras(manifest, name, entry["lora"]), words, references, teachers)


def _listed_loras(manifest: Path, name: str, given: Any) -> Path | tuple[tuple[Path, float], ...]:
    """A file; or a list of files, and of {"file", "weight"}."""
    if not isinstance(given, list):
        return manifest.parent / str(given)
    found = [one if isinstance(one, Mapping) else {"file": one} for one in given]
    try:
        return tuple(
            (manifest.parent / str(one["file"]), check_weight(one.get("weight", 1), "weight")) for one in found
        )
    except SettingsError as error:
        raise KloraError(f"{manifest}: {name}: lora: {error}") from None
