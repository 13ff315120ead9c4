"""A subject file and a style file, opened, checked against each other, and ready to be planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike

from klora.cache import ScoreCache
from klora.fusion.plan import ROLES, FileModule, FusionPlan, make_plan, wanted_k
from klora.fusion.policies import resolve
from klora.fusion.policies.base import Active
from klora.lora.deltas import Delta
from klora.lora.file import Coverage, LoraFile, check_partner, coverage
from klora.lora.names import kind_of, slice_of, sort_key
from klora.settings import Settings

KINDS_IN_SCOPE = {
    "attention": {"attention"},
    "linear": {"attention", "linear"},
    "all": {"attention", "linear", "conv"},
}


@dataclass(frozen=True)
class Pair:
    """Two LoRA files that are to be fused."""

    subject: LoraFile
    style: LoraFile
    cache: ScoreCache

    @classmethod
    def open(cls, subject: str | PathLike[str], style: str | PathLike[str], cache: ScoreCache | None = None) -> Pair:
        """Open both files; LoraFileError for a bad one, MismatchError where they belong to different models."""
        pair = cls(LoraFile.open(subject), LoraFile.open(style), cache or ScoreCache())
        check_partner(pair.subject, pair.style)
        return pair

    @property
    def coverage(self) -> Coverage:
        """Which modules are in both files, in one only, or not understood."""
        return coverage(self.subject, self.style)

    @property
    def architecture(self) -> str | None:
        """What the files were made for, as far as they tell."""
        return self.subject.architecture or self.style.architecture

    def plan(self, settings: Settings, architecture: str | None = None) -> FusionPlan:
        """Score what is contested (or take the scores from the cache) and decide; LoraValueError for NaN or infinity.

        `architecture` is the model's, where one is at hand; the files' own otherwise.
        """
        settings = resolve(settings, architecture or self.architecture)
        kinds = KINDS_IN_SCOPE[settings.scope]
        wanted = {
            name: {wanted_k(settings, delta.rank, self.style.modules[name].rank, delta.shape)}
            for name, delta in self.subject.modules.items()
            if name in self.style.modules and kind_of(name) in kinds
        }
        subject, style = self.cache.scores(self.subject, wanted), self.cache.scores(self.style, wanted)
        names = sorted({*self.subject.modules, *self.style.modules}, key=sort_key)
        return make_plan(
            (
                FileModule(
                    name,
                    slice_of(name),
                    in_scope=name in wanted,
                    subject_name=_key(self.subject.modules, name),
                    style_name=_key(self.style.modules, name),
                    subject=subject[name] if name in wanted else None,
                    style=style[name] if name in wanted else None,
                )
                for name in names
            ),
            settings,
        )

    def text_encoder_active(self, settings: Settings) -> dict[str, Active]:
        """What is active in each text-encoder module of either file, during the whole generation."""
        role = ROLES[resolve(settings, self.architecture).text_encoder]
        return {
            name: Active(
                role.subject if name in self.subject.text_encoder else 0.0,
                role.style if name in self.style.text_encoder else 0.0,
            )
            for name in sorted({*self.subject.text_encoder, *self.style.text_encoder})
        }


def _key(modules: Mapping[str, Delta], name: str) -> str | None:
    return modules[name].key if name in modules else None
