"""A pair that nodes have opened and planned: what goes from node to node as a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klora.comfyui.messages import scoring_bar
from klora.comfyui.sides import SideFiles, open_pair
from klora.errors import by_name, named_by
from klora.fusion.plan import FusionPlan
from klora.hosts.comfyui.model import ComfyHost
from klora.hosts.comfyui.text_encoder import clip_with
from klora.pair import Pair, by_strength
from klora.report.summary import absent_share, notices
from klora.settings import Settings
from klora.text import count_of


@dataclass(frozen=True)
class PlannedFusion:
    """Two sides, under the names of a model where there is one, and what of them acts when.

    `settings` are the user's, with what is left to K-LoRA; `left_out` says what found no place in the model.
    """

    pair: Pair
    plan: FusionPlan
    settings: Settings
    sides: tuple[SideFiles, SideFiles]
    left_out: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of both sides."""
        return tuple(path for side in self.sides for path, _ in side)

    @property
    def title(self) -> str:
        """The names of both files, for pictures."""
        return f"{self.pair.subject.name} × {self.pair.style.name}"

    def with_steps(self, steps: int) -> FusionPlan:
        """The plan of a sampler that makes so many steps."""
        return self.plan.with_steps(steps)

    def warnings(self) -> list[str]:
        """What the user should know, one line each."""
        return [by_name(line, *self.files) for line in (*notices(self.pair, self.plan), *self.left_out)]

    def in_short(self) -> str:
        """What meets and who gets how much of it, on one line."""
        contested, all_modules = len(self.plan.contested), len(self.plan.modules)
        share = absent_share(self.plan) if self.plan.share is None else f"subject {self.plan.share:.0%}"
        return f"{contested} of {all_modules} modules contested; {share}"


def open_fusion(subject: SideFiles, style: SideFiles, settings: Settings, model: Any = None) -> PlannedFusion:
    """Open both sides and plan their fusion, in a ModelPatcher's model where one is given.

    Raises KloraError for what cannot be opened, does not go together or does not fit the model.
    """
    with named_by(*(path for path, _ in (*subject, *style))):
        pair = open_pair(subject, style)
        if model is None:
            return PlannedFusion(pair, pair.plan(settings, on_scored=scoring_bar()), settings, (subject, style))
        host = ComfyHost(model)
        pair = host.fit(pair)
        plan = pair.plan(settings, host.device, scoring_bar())
        # A session is made here for what it says and raises; samplers make their own.
        return PlannedFusion(pair, plan, settings, (subject, style), tuple(host.session(pair, plan).left_out))


def clip_of(fusion: PlannedFusion, clip: Any) -> tuple[Any, list[str]]:
    """A CLIP in which the files' text-encoder parts act as the settings say, and what of them does nothing.

    `clip` is None where the node is given none.
    """
    active = fusion.pair.text_encoder_active(fusion.settings)
    sides = (
        (fusion.pair.subject, 0, fusion.settings.subject_strength),
        (fusion.pair.style, 1, fusion.settings.style_strength),
    )
    said = []
    for file, side, strength in sides:
        strengths = {name: strength * active[name][side] for name in file.text_encoder}
        shares = by_strength(file.text_encoder, strengths)
        if not shares:
            continue
        if clip is None:
            said.append(f"{file.name} has a text-encoder part, which does nothing without a clip")
            continue
        missing: list[str] = []
        for share, deltas in shares.items():
            with named_by(*fusion.files):
                clip, without = clip_with(clip, deltas, share)
            missing += without
        if missing:
            said.append(f"not in the clip: {count_of(len(missing), 'module')} of {file.name}, such as {missing[0]}")
    return clip, said
