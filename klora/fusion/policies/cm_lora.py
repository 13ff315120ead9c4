"""CMLoRA (Cached Multi-LoRA Composition, arXiv 2502.04923), simplified: Composite, a dominant LoRA in turns, a cache.

Of the paper it lacks the order by frequency, which leaves a subject and a style in turns anyway (both are of its
high-frequency kind, only backgrounds are not), and the cache of features inside the UNet: predictions are kept instead.
"""

from __future__ import annotations

from klora.fusion.policies.base import STYLE, SUBJECT, Forward, Moment
from klora.fusion.policies.composite import Composite

N = 2
"""How many LoRAs there are."""
D = N - 0.5
DOMINANT, OTHER = D * N / (D + N - 1), N / (D + N - 1)
"""The weights of the dominant LoRA and of any other; they add up to N."""


class CmLora(Composite):
    """ε = (1/n)·Σ w_i·ε_i, with w = d·n/(d+n−1) for the dominant LoRA, n/(d+n−1) for the other, d = n − 0.5.

    Dominance goes round after every `period` steps; the other LoRA's prediction is kept for `refresh` steps.
    """

    name = "cm-lora"
    title = "CMLoRA (simplified)"
    own_settings = frozenset({"period", "refresh"})

    def predictions(self, moment: Moment) -> tuple[Forward, ...]:
        lead, other = (STYLE, SUBJECT) if moment.step // self.settings.period % 2 else (SUBJECT, STYLE)
        return (Forward(lead, DOMINANT / N), Forward(other, OTHER / N, self.settings.refresh))
