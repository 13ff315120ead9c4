"""The fusion that a tag asks for, with its files opened."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from klora.fusion.plan import FusionPlan
from klora.fusion.scores import OnScored
from klora.hosts.base import Host
from klora.hosts.webui.text_encoder import TextPart
from klora.pair import Pair, by_strength
from klora.settings import Settings
from klora.webui.prompt_tag import Tag
from klora.webui.sides import SideLora


@dataclasses.dataclass(frozen=True)
class RequestedFusion:
    """A tag with its files opened."""

    tag: Tag
    subject: tuple[SideLora, ...]
    style: tuple[SideLora, ...]
    pair: Pair
    settings: Settings
    """Those of the tag, with the files that its names of references stand for."""

    def text_parts(self) -> list[TextPart]:
        """The text-encoder parts that act, with the strengths they act with."""
        settings = self.settings
        weights = self.pair.text_encoder_active(settings)
        parts = []
        for index, listed, side, strength in (
            (0, self.subject, self.pair.subject, settings.subject_strength),
            (1, self.style, self.pair.style, settings.style_strength),
        ):
            for (_, lora, _), (file, weight) in zip(listed, side.parts, strict=True):
                shares = {name: strength * (weights[name][index] * weight) for name in file.text_encoder}
                for share, deltas in by_strength(file.text_encoder, shares).items():
                    parts.append(TextPart(lora, deltas, share, file.sha256))
        return parts

    @property
    def paths(self) -> tuple[Path, ...]:
        """Where the files of both sides lie."""
        return tuple(one.lora.path for one in (*self.subject, *self.style))

    def for_model(self, host: Host) -> RequestedFusion:
        """The same under the names of a loaded model; MismatchError where a file is for another."""
        return dataclasses.replace(self, pair=host.fit(self.pair))

    def plan(self, device: torch.device, hires: bool = False, on_scored: OnScored | None = None) -> FusionPlan:
        """Decide for one pass; the pass that `passes` leaves out applies the pair as two plain LoRAs.

        Scores are computed on `device`; `on_scored` hears how many modules of both files have been scored, of how many,
        where that takes time.
        """
        settings = self.settings
        if settings.passes not in ("both", "hires" if hires else "first"):
            settings = dataclasses.replace(settings, policy="direct", preset="1,1", share=None)
        return self.pair.plan(settings, device, on_scored)
