"""LoRA-LEGO (Zhao et al., Merging LoRAs like Playing LEGO, ICLR 2025, arXiv 2409.16167)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klora.fusion.policies.base import Active
from klora.fusion.policies.merge import Merge

if TYPE_CHECKING:
    from klora.lora.deltas import Delta


class Lego(Merge):
    """One LoRA of rank k, of as many clusters of both LoRAs' rank-wise units; strengths scale the units.

    Both of the paper's reweightings are there: a centroid takes the mean norm of its cluster's units, and the output is
    scaled by √(r/k), r being the rank of the files (here the mean of the two).
    """

    name = "lego"
    title = "LoRA-LEGO"
    own_settings = frozenset({"seed", "clusters"})

    def merged(self, module: str, subject: Delta, style: Delta, strengths: Active) -> Delta:
        from klora.fusion.policies.lego.clusters import merge_units

        return merge_units((subject, style), strengths, self.settings.seed, self.settings.clusters)
