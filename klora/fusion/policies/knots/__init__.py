"""KnOTS (Stoica et al., Model merging with SVD to tie the Knots, ICLR 2025, arXiv 2410.19735), with TIES."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klora.fusion.policies.base import Active
from klora.fusion.policies.merge import Merge

if TYPE_CHECKING:
    from klora.lora.deltas import Delta


class Knots(Merge):
    """[ΔW_c ΔW_s] = U·S·[V_c V_s]ᵀ: TIES of S·V_cᵀ and S·V_sᵀ, which share the basis U, then U times it.

    Low-rank as it is, r_c + r_s at most, and computed from the factors.
    """

    name = "knots"
    title = "KnOTS-TIES merge"
    usual_density = 0.2
    own_settings = frozenset({"density"})

    def merged(self, module: str, subject: Delta, style: Delta, strengths: Active) -> Delta:
        from klora.fusion.policies.knots.basis import tie

        return tie((subject, style), strengths, self.density)
