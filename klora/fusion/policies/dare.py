"""DARE (Yu et al., Language Models are Super Mario, ICML 2024, arXiv 2311.03099)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klora.fusion.policies.base import Active
from klora.fusion.policies.merge import Merge

if TYPE_CHECKING:
    from klora.lora.deltas import Delta


class Dare(Merge):
    """Drop and rescale: each entry of each ΔW stays with probability p = `density`, divided by p, so its mean stays.

    What stays is summed, or merged by TIES' election and mean. Draws follow from the selection seed, the module's name
    and the side, so that a picture can be made again.
    """

    name = "dare"
    title = "DARE merge"
    own_settings = frozenset({"density", "dare_merge", "seed", "merge_rank"})

    def merged(self, module: str, subject: Delta, style: Delta, strengths: Active) -> Delta:
        from klora.fusion.entries import Drawn, cut_merge

        thinning = Drawn(f"{self.settings.seed}:{module}", self.density)
        elect = self.settings.dare_merge == "ties"
        return cut_merge((subject, style), strengths, thinning, elect, rank=self.settings.merge_rank)
