"""TIES (Yadav et al., TIES-Merging, NeurIPS 2023, arXiv 2306.01708)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klora.fusion.policies.base import Active
from klora.fusion.policies.merge import Merge

if TYPE_CHECKING:
    from klora.lora.deltas import Delta


class Ties(Merge):
    """Trim, elect, merge: of each ΔW the `density` of largest entries; of these, those of the sum's sign; their mean.

    The paper trims all of a model at once, here each module is trimmed, as in PEFT. Its λ are the strengths.
    """

    name = "ties"
    title = "TIES merge"
    usual_density = 0.2  # the paper's k = 20 %
    own_settings = frozenset({"density", "merge_rank"})

    def merged(self, module: str, subject: Delta, style: Delta, strengths: Active) -> Delta:
        from klora.fusion.entries import Largest, cut_merge

        thinning = Largest.of((subject, style), self.density)
        return cut_merge((subject, style), strengths, thinning, elect=True, rank=self.settings.merge_rank)
