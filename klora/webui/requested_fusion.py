"""The fusion that a tag asks for, with its two files opened."""

from __future__ import annotations

import dataclasses

import torch

from klora.fusion.plan import FusionPlan
from klora.fusion.scores import OnScored
from klora.hosts.base import Host
from klora.hosts.webui.lora_library import ListedLora
from klora.hosts.webui.text_encoder import TextPart
from klora.pair import Pair
from klora.settings import Settings
from klora.webui.prompt_tag import Tag


@dataclasses.dataclass(frozen=True)
class RequestedFusion:
    """A tag with its two files opened."""

    tag: Tag
    subject: ListedLora
    style: ListedLora
    pair: Pair
    settings: Settings
    """Those of the tag, with the files that its names of references stand for."""

    def text_parts(self) -> list[TextPart]:
        """The text-encoder parts that act, with the strengths they act with."""
        settings = self.settings
        weights = self.pair.text_encoder_active(settings)
        parts = []
        for lora, file, side, strength in (
            (self.subject, self.pair.subject, 0, settings.subject_strength),
            (self.style, self.pair.style, 1, settings.style_strength),
        ):
            deltas = {name: delta for name, delta in file.text_encoder.items() if weights[name][side]}
            if deltas and strength:
                parts.append(TextPart(lora, deltas, strength, file.sha256))
        return parts

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
