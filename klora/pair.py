"""A subject and a style, opened, checked against each other, and ready to be planned."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klora.cache import ScoreCache
from klora.errors import SettingsError
from klora.fusion.plan import ROLES, FileModule, FusionPlan, make_plan, wanted_k
from klora.fusion.policies import resolve
from klora.fusion.policies.base import Active
from klora.fusion.scores import OnScored
from klora.lora.blocks import block_weights
from klora.lora.checks import check_partner
from klora.lora.coverage import Coverage, coverage
from klora.lora.deltas import Delta
from klora.lora.disk import Identity, identity
from klora.lora.file import LoraFile, LoraSource
from klora.lora.fit import telling_shapes
from klora.lora.memory import TensorsInMemory
from klora.lora.model_index import ModelIndex
from klora.lora.names import kind_of, slice_of, sort_key
from klora.lora.side import Side, SideSource, read_side
from klora.lora.source import TensorSource
from klora.settings import Settings

if TYPE_CHECKING:
    import torch

MAX_PLANS = 8
"""How many plans a pair keeps."""
BLOCK_SETTINGS = ("subject_blocks", "style_blocks")
SUBJECT, STYLE = "subject (in memory)", "style (in memory)"
"""How messages call state dicts."""
Known = tuple[tuple[Path | None, Identity | str, float], ...]
Sources = Sequence[tuple[LoraSource | TensorSource, float]]
SAME_FILE = "subject and style are the same file, so that there is nothing to choose between"
KINDS_IN_SCOPE = {
    "attention": {"attention"},
    "linear": {"attention", "linear"},
    "all": {"attention", "linear", "conv"},
}


@dataclass(frozen=True)
class Pair:
    """Two sides that are to be fused; with `model`, their modules go by the names of a model at hand."""

    subject: Side
    style: Side
    cache: ScoreCache
    model: ModelIndex | None = field(default=None, compare=False, repr=False)
    _plans: dict[tuple[Settings, str | None, Side, Side], FusionPlan] = field(
        default_factory=dict, compare=False, repr=False
    )

    @classmethod
    def open(cls, subject: SideSource, style: SideSource, cache: ScoreCache | None = None) -> Pair:
        """Open all files; LoraFileError for a bad one, MismatchError where they belong to different models.

        SettingsError for what is no side. Without a model at hand, files of an unknown architecture are compared by
        bare names.
        """
        return cls._of(read_side(subject, "subject"), read_side(style, "style"), cache or ScoreCache())

    @classmethod
    def _of(cls, subject: Sources, style: Sources, cache: ScoreCache) -> Pair:
        pair = cls(Side.of(subject, SUBJECT), Side.of(style, STYLE), cache)
        if not (pair.subject.is_named_by_rule and pair.style.is_named_by_rule):
            pair = dataclasses.replace(pair, subject=pair.subject.bare(), style=pair.style.bare())
        # What one file alone does not tell of a layer, another may.
        shapes = telling_shapes(lora.modules for lora in pair.loras)
        pair = dataclasses.replace(pair, subject=pair.subject.in_shapes(shapes), style=pair.style.in_shapes(shapes))
        for one, other in itertools.combinations(pair.loras, 2):
            check_partner(one, other)
        return pair

    @property
    def loras(self) -> tuple[LoraFile, ...]:
        """All files of both sides."""
        return (*self.subject.loras, *self.style.loras)

    def for_model(self, model: ModelIndex) -> Pair:
        """The same pair under the names of a model; MismatchError where a fused weight cannot be split as it is."""
        subject, style = self.subject.for_model(model), self.style.for_model(model)
        return dataclasses.replace(self, subject=subject, style=style, model=model)

    @property
    def coverage(self) -> Coverage:
        """Which modules are in both files, in one only, or not understood."""
        return coverage(self.subject, self.style)

    @property
    def architecture(self) -> str | None:
        """What the model at hand is, or else what the files were made for; None where that is unknown."""
        if self.model:
            return self.model.architecture
        return self.subject.architecture or self.style.architecture

    def plan(
        self, settings: Settings, device: torch.device | None = None, on_scored: OnScored | None = None
    ) -> FusionPlan:
        """Score what is contested (or take the scores from the cache) and decide; LoraValueError for NaN or infinity.

        What has to be computed is computed on `device` where that is an accelerator; `on_scored` is called with
        how many modules of both files are done, and of how many.
        """
        # A pair under the names of a model shares its plans with the pair as it was opened.
        key = (settings, self.architecture, self.subject, self.style)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan(settings, device, on_scored)
            # Several threads may do so at once.
            for old in list(self._plans)[:-MAX_PLANS]:
                self._plans.pop(old, None)
        return plan

    def _plan(self, settings: Settings, device: torch.device | None, on_scored: OnScored | None) -> FusionPlan:
        settings = resolve(settings, self.architecture)
        kinds = KINDS_IN_SCOPE[settings.scope]
        kind = self.model.kind_of if self.model else kind_of
        names = sorted({*self.subject.modules, *self.style.modules}, key=sort_key)
        blocks = block_weights(settings)
        weights = {name: Active(*(side.of(name) for side in blocks)) for name in names}
        for weighted, side, setting in zip(blocks, (self.subject, self.style), BLOCK_SETTINGS, strict=True):
            weighted.check([*side.modules, *side.text_encoder], self.architecture, setting)
        self._check_acting(settings, weights)
        wanted = {
            name: {wanted_k(settings, delta.rank, self.style.modules[name].rank, delta.shape)}
            for name, delta in self.subject.modules.items()
            if name in self.style.modules and kind(name, delta.shape) in kinds and all(weights[name])
        }
        progress = _Progress(on_scored, 2 * len(wanted))
        subject = self.cache.scores(self.subject, wanted, device, progress.after(0))
        style = self.cache.scores(self.style, wanted, device, progress.after(len(wanted)))
        progress.finish()
        plan = make_plan(
            (
                FileModule(
                    name,
                    slice_of(name),
                    in_scope=name in wanted,
                    subject_name=_key(self.subject.modules, name),
                    style_name=_key(self.style.modules, name),
                    subject=subject[name] if name in wanted else None,
                    style=style[name] if name in wanted else None,
                    weights=weights[name],
                )
                for name in names
            ),
            settings,
        )
        if self.subject.acting and self.subject.identity == self.style.identity:
            return dataclasses.replace(plan, warnings=(SAME_FILE, *plan.warnings))
        return plan

    def _check_acting(self, settings: Settings, weights: Mapping[str, Active]) -> None:
        """Raise SettingsError where the multipliers leave nothing of either side."""
        acts = any(weights[name].subject for name in self.subject.modules)
        acts = acts or any(weights[name].style for name in self.style.modules)
        if weights and not acts and not any(map(any, self.text_encoder_active(settings).values())):
            raise SettingsError(
                "subject_blocks", "neither side acts in any block; give one a multiplier that is not 0, here or beside"
            )

    def text_encoder_active(self, settings: Settings) -> dict[str, Active]:
        """What is active in each text-encoder module of either file, during the whole generation."""
        subject, style = self.subject.text_encoder, self.style.text_encoder
        role = self.text_role(settings)
        return {
            name: role(name).times(Active(float(name in subject), float(name in style)))
            for name in sorted({*subject, *style})
        }

    def text_role(self, settings: Settings) -> Callable[[str], Active]:
        """From the name of a module or parameter of a text encoder to how much acts of each file that has it."""
        role, (ours, theirs) = ROLES[resolve(settings, self.architecture).text_encoder], block_weights(settings)
        return lambda name: role.times(Active(ours.of(name), theirs.of(name)))


def by_strength(deltas: Mapping[str, Delta], strengths: Mapping[str, float]) -> dict[float, dict[str, Delta]]:
    """The deltas that act, by how strongly: hosts apply a text encoder's part with one strength for many modules."""
    found: dict[float, dict[str, Delta]] = {}
    for name, delta in deltas.items():
        if strengths[name]:
            found.setdefault(strengths[name], {})[name] = delta
    return found


def side_facts(side: Side, cache: ScoreCache, path: bool = False) -> dict[str, Any]:
    """The name (or the `path`) and digest of a side's file; of several, or one with a weight, those of each."""
    found = [
        # The cache remembers digests, and a file of scored modules need not be read for it.
        {"file": lora.where if path else lora.file_name, "sha256": cache.digest(lora), "weight": weight}
        for lora, weight in side.parts
    ]
    if len(found) > 1 or found[0]["weight"] != 1:
        return {"loras": found}
    return {"file": found[0]["file"], "sha256": found[0]["sha256"]}


class _Progress:
    """Reports the scoring of both sides to `on_scored` as one count, which ends at all where some were known before."""

    def __init__(self, on_scored: OnScored | None, total: int) -> None:
        self._on_scored, self._total = on_scored, total
        self._done = 0

    def after(self, before: int) -> OnScored:
        """The callback for the scoring of one file, whose modules are counted after `before` others."""
        return lambda done, _: self._report(before + done)

    def finish(self) -> None:
        if 0 < self._done < self._total:
            self._report(self._total)

    def _report(self, done: int) -> None:
        self._done = done
        if self._on_scored:
            self._on_scored(done, self._total)


def _key(modules: Mapping[str, Delta], name: str) -> str | None:
    return modules[name].key if name in modules else None


class Pairs:
    """The pairs opened last, at most `limit`; a file that has changed on disk or in memory is opened anew."""

    def __init__(self, limit: int = 2) -> None:
        self._limit = limit
        self._pairs: dict[tuple[Known, Known, Path], Pair] = {}

    def open(self, subject: SideSource, style: SideSource, cache: ScoreCache | None = None) -> Pair:
        """Open two sides as `Pair.open` does, or give them as they were opened before."""
        ours, theirs = _taken(subject, "subject", SUBJECT), _taken(style, "style", STYLE)
        cache = cache or ScoreCache()
        key = (_known(ours), _known(theirs), cache.folder)
        pair = self._pairs.pop(key, None) or Pair._of(ours, theirs, cache)
        self._pairs[key] = pair
        for old in list(self._pairs)[: -self._limit]:
            self._pairs.pop(old, None)
        return pair


def _taken(source: SideSource, side: str, name: str) -> list[tuple[Path | TensorsInMemory, float]]:
    return [
        (TensorsInMemory(lora, name) if isinstance(lora, Mapping) else Path(lora), weight)
        for lora, weight in read_side(source, side)
    ]


def _known(side: Sequence[tuple[Path | TensorsInMemory, float]]) -> Known:
    """What a side is known again by."""
    return tuple(
        (lora, identity(lora), weight) if isinstance(lora, Path) else (None, lora.identity, weight)
        for lora, weight in side
    )


PAIRS = Pairs()
"""What all of a process shares."""
