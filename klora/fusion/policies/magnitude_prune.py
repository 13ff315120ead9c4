"""Magnitude pruning: the sum of what is largest in each LoRA (PEFT's `magnitude_prune`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klora.fusion.policies.base import Active
from klora.fusion.policies.merge import Merge

if TYPE_CHECKING:
    from klora.lora.deltas import Delta


class MagnitudePrune(Merge):
    """The sum of the `density` of largest entries of each ΔW: TIES without its election."""

    name = "magnitude-prune"
    title = "Magnitude-pruned merge"
    own_settings = frozenset({"density", "merge_rank"})

    def merged(self, module: str, subject: Delta, style: Delta, strengths: Active) -> Delta:
        from klora.fusion.entries import Largest, cut_merge

        thinning = Largest.of((subject, style), self.density)
        return cut_merge((subject, style), strengths, thinning, elect=False, rank=self.settings.merge_rank)
