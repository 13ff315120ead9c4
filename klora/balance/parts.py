"""How much of each LoRA a picture shows.

    part = (G − G_without) / (G_with − G_without)

G_with is the gain on pictures that the model makes with the LoRA, G_without on those that it makes without. What is
seen in noise is the mean of all pictures that may lie under it, x̂0 = E[x0 | x_t], so that on average G_with = 1 and
G_without = −1, for any model and any LoRA: no picture of a LoRA alone is needed. Pictures that another LoRA changes in
a direction of its own have no part. Guidance exaggerates, and parts with it, by little (docs/balance.md).
"""

from __future__ import annotations

from dataclasses import dataclass

WITH, WITHOUT = 1.0, -1.0
"""G on pictures of a model with a LoRA, and without it, on average."""


def part(gain: float) -> float:
    """The part of a LoRA in a picture, by its gain: 1 as where it acts alone and in full, 0 as without it."""
    return (gain - WITHOUT) / (WITH - WITHOUT)


@dataclass(frozen=True)
class Parts:
    """The subject's and the style's part in a picture."""

    subject: float
    style: float

    @property
    def both(self) -> float:
        """The harmonic mean, 0 where one of them is not there: high only where both are."""
        if min(self.subject, self.style) <= 0:
            return 0.0
        return 2 / (1 / self.subject + 1 / self.style)

    def __str__(self) -> str:
        # Noise may take a part beyond all or below nothing.
        subject, style = (f"{min(max(part, 0.0), 1.0):.0%}".replace("%", " %") for part in (self.subject, self.style))
        return f"subject kept {subject}, style {style}"
