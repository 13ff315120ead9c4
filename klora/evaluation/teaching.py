"""References that guide pictures, kept apart from those that score what comes of it.

A picture that was moved towards a reference by CLIP is near it under the same CLIP, whatever it shows: the scorer must
not be the teacher. So either other pictures score, for every method of the table, or another encoder does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klora.errors import KloraError
from klora.evaluation.identity import identity_of
from klora.evaluation.study import Concept, StudyPair
from klora.fusion.policies import POLICIES
from klora.generation.methods import Method
from klora.settings import Settings

STUDY = "study"
"""What `style_refs` and `subject_refs` say where the references of each pair are meant."""

Split = tuple[tuple[Path, ...], tuple[Path, ...]]
"""The pictures that teach, and those that score."""


@dataclass(frozen=True)
class References:
    """What the subject's references and the style's differ in."""

    name: str
    refs: str
    encoder: str
    option: str


SIDES = (
    References("style", "style_refs", "clip_model", "--clip"),
    References("subject", "subject_refs", "dino_model", "--dino"),
)


@dataclass(frozen=True)
class Teaching:
    """The pairs as they are scored, and what teaches: pictures by (side, name); `notes` say which."""

    pairs: tuple[StudyPair, ...]
    teachers: Mapping[tuple[str, str], tuple[Path, ...]]
    notes: tuple[str, ...] = ()

    def settings(self, method: Method, pair: StudyPair) -> Settings:
        """A method's settings for one pair, its own references in the place of the word for them."""
        given: dict[str, Any] = {
            side.refs: ";".join(map(str, self.teachers[side.name, getattr(pair, side.name).name]))
            for side in SIDES
            if getattr(method.settings, side.refs) == STUDY
        }
        return dataclasses.replace(method.settings, **given) if given else method.settings


def arrange(pairs: Sequence[StudyPair], methods: Iterable[Method], scorers: Mapping[str, str]) -> Teaching:
    """Say which references teach and which score; `scorers` are the scoring models by option.

    Raises KloraError where a method would be scored by its teacher and there is no picture to spare.
    """
    methods = list(methods)
    teachers: dict[tuple[str, str], tuple[Path, ...]] = {}
    notes: list[str] = []
    for side in SIDES:
        taught = [method for method in methods if getattr(method.settings, side.refs) == STUDY]
        _refuse_the_unteachable(taught)
        if not taught:
            continue
        concepts = {concept.name: concept for concept in (getattr(pair, side.name) for pair in pairs)}
        same = any(
            side.option in scorers
            and identity_of(getattr(method.settings, side.encoder)) == identity_of(scorers[side.option])
            for method in taught
        )
        split = {name: _split(concept, side, same) for name, concept in concepts.items()}
        teachers |= {(side.name, name): found[0] for name, found in split.items()}
        pairs = [_scored_by(pair, side, split) for pair in pairs]
        names = ", ".join(method.name for method in taught)
        how = "references that do not score" if same else "another encoder than the one that scores"
        notes.append(f"{side.name}: {names} guided towards the pair's own references, with {how}")
    return Teaching(tuple(pairs), teachers, tuple(notes))


def _refuse_the_unteachable(methods: Iterable[Method]) -> None:
    for method in methods:
        if not POLICIES[method.settings.policy].takes_references:
            able = ", ".join(name for name, policy in POLICIES.items() if policy.takes_references)
            raise KloraError(f"--policies: {method.name}: takes no references; use {able}")


def _split(concept: Concept, side: References, same: bool) -> Split:
    """The pictures that are kept apart teach; else every other one, or all where another encoder scores."""
    if not concept.references:
        raise KloraError(
            f"{concept.name}: has no reference pictures that could teach; --policies: name pictures instead"
        )
    if concept.teachers:
        return concept.teachers, concept.references
    if not same:
        return concept.references, concept.references
    if len(concept.references) < 2:
        raise KloraError(
            f"{concept.name}: has one reference, which would teach and score; add a second, or a"
            f" folder teach/, or score with another model ({side.option})"
        )
    return concept.references[::2], concept.references[1::2]


def _scored_by(pair: StudyPair, side: References, split: Mapping[str, Split]) -> StudyPair:
    concept: Concept = getattr(pair, side.name)
    scored: dict[str, Any] = {side.name: dataclasses.replace(concept, references=split[concept.name][1])}
    return dataclasses.replace(pair, **scored)
