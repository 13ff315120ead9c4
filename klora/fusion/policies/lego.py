"""LoRA-LEGO (Zhao et al., Merging LoRAs like Playing LEGO, ICLR 2025, arXiv 2409.16167)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klora.fusion.policies.base import BOTH, Active, Moment, Policy

if TYPE_CHECKING:
    from klora.lora.deltas import Delta


class Lego(Policy):
    """One LoRA of rank k, of as many clusters of both LoRAs' rank-wise units; strengths scale the units.

    Both of the paper's reweightings are there: a centroid takes the mean norm of its cluster's units, and the output is
    scaled by √(r/k), r being the rank of the files (here the mean of the two).
    """

    name = "lego"
    title = "LoRA-LEGO"
    own_settings = frozenset({"seed", "clusters"})
    folds_strengths = True

    def decide(self, module: str, rho: float, moment: Moment) -> Active:
        return BOTH

    def combine(self, subject: Delta, style: Delta) -> tuple[Delta | None, Delta | None]:
        from klora.fusion.clusters import merge_units

        strengths = (self.settings.subject_strength, self.settings.style_strength)
        merged = merge_units((subject, style), strengths, self.settings.seed, self.settings.clusters)
        # Beside a style that is zero, or a subject, what is not zero acts: in its own place, where the plan expects it.
        return (merged, None) if subject_acts(subject) else (None, merged)


def subject_acts(subject: Delta) -> bool:
    """Whether the subject's delta is more than zeros."""
    factors = subject.factors()
    return factors is None or all(bool(factor.any()) for factor in (factors.up, factors.down))
