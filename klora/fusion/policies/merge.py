"""What merges have in common: two LoRAs become one before anything is sampled."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from klora.fusion.policies.base import BOTH, Active, Moment, Policy

if TYPE_CHECKING:
    from klora.lora.deltas import Delta


class Merge(Policy):
    """One delta in the place of a contested module's two, with the user's strengths in it, at every step.

    `usual_density` is what a `density` left to K-LoRA means.
    """

    static = True
    folds_strengths = True
    usual_density: ClassVar[float] = 0.5

    @property
    def strengths(self) -> Active:
        """The user's strengths of subject and style."""
        return Active(self.settings.subject_strength, self.settings.style_strength)

    @property
    def density(self) -> float:
        """The fraction of entries that is kept."""
        return self.usual_density if self.settings.density is None else self.settings.density

    @abstractmethod
    def merged(self, module: str, subject: Delta, style: Delta, strengths: Active) -> Delta:
        """The one delta, of both times their strengths; MismatchError for a family that will not do."""

    def decide(self, module: str, rho: float, moment: Moment) -> Active:
        return BOTH

    def combine(
        self, module: str, subject: Delta, style: Delta, weights: Active = BOTH
    ) -> tuple[Delta | None, Delta | None]:
        merged = self.merged(module, subject, style, self.strengths.times(weights))
        # Beside a style that is zero, or a subject, what is not zero acts: in its own place, where the plan expects it.
        return (merged, None) if acts(subject) else (None, merged)


def acts(delta: Delta) -> bool:
    """Whether a delta is more than zeros."""
    factors = delta.factors()
    tensors = (factors.up, factors.down) if factors else (delta.matrix(),)
    return bool(delta.scale) and all(bool(tensor.any()) for tensor in tensors)
