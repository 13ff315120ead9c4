"""What a denoiser is shown at one noise level, and what its prediction says of the picture in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
"""What a model predicts: the noise ε, v = signal·ε − noise·x0, the picture x0, or the flow ε − x0."""


@dataclass(frozen=True)
class Mixture:
    """signal·x0 + noise·ε, which is what a denoiser is shown, and the kind of its predictions.

    For flows signal + noise = 1, for all others signal² + noise² = 1.
    """

    signal: float
    noise: float
    kind: Prediction

    @classmethod
    def at_level(cls, sigma: float, kind: Prediction) -> Mixture:
        """The one in which noise is `sigma` times as strong as the picture; 0 ≤ σ < ∞."""
        signal = 1 / (1 + sigma) if kind == "flow" else 1 / (1 + sigma**2) ** 0.5
        return cls(signal, sigma * signal, kind)

    @property
    def level(self) -> float:
        """σ: how many times as strong as the picture the noise is."""
        return self.noise / self.signal

    def of(self, clean: Tensor, noise: Tensor) -> Tensor:
        """What the denoiser is shown of a picture `clean` (x0) under `noise` (ε), both of one shape."""
        return self.signal * clean + self.noise * noise

    def clean(self, shown: Tensor, predicted: Tensor) -> Tensor:
        """The x0 that is `predicted` in what was `shown`, both of one shape."""
        if self.kind == "sample":
            return predicted
        if self.kind == "v_prediction":
            return self.signal * shown - self.noise * predicted
        if self.kind == "flow":
            return shown - self.noise * predicted
        return (shown - self.noise * predicted) / self.signal
