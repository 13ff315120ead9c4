"""Reference guidance, the second part of Dynamic Training-Free Fusion (arXiv 2602.15539), as an interpretation.

x0 → image → loss = w_s·(1 − cos CLIP(x0, style references)) + w_c·(1 − cos DINO(x0, subject references));
x_t ← x_t − m·∇loss/‖∇loss‖, in a window of τ, with the gradient through x0 while the model's output is held fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Encode = Callable[[Tensor], Tensor]
"""From images (B, 3, H, W) in [0, 1] to features (B, d), so that gradients pass."""


@dataclass(frozen=True)
class Goal:
    """Likeness to reference images under one encoder: `references` (n, d) are their features."""

    encode: Encode
    references: Tensor
    weight: float

    def loss(self, images: Tensor) -> Tensor:
        """w·(1 − cos), the mean over the references, of each of `images` (B, 3, H, W): (B,)."""
        features = F.normalize(self.encode(images).float(), dim=-1)
        references = F.normalize(self.references.float().to(features.device), dim=-1)
        return self.weight * (1 - (features @ references.t()).mean(-1))


@dataclass(frozen=True)
class ReferenceGuidance:
    """What moves latents towards the goals: by a distance of `step` (m) at a time, while start ≤ τ ≤ stop."""

    goals: Sequence[Goal]
    step: float
    start: float
    stop: float

    def acts(self, tau: float) -> bool:
        """Whether τ lies in the window."""
        return self.start <= tau <= self.stop

    def shift(self, x_t: Tensor, x0_of: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]) -> Tensor:
        """What is to be taken from x_t: m·∇loss/‖∇loss‖ of each latent of the batch, in the shape of x_t.

        `x0_of` predicts x0 from x_t, `decode` makes images of it, (B, 3, H, W) in [0, 1]. Zero where the gradient
        vanishes or is not finite (a decoder that overflows in half precision).
        """
        # Hosts sample without gradients, some in inference mode.
        with torch.inference_mode(False), torch.enable_grad():
            x = x_t.detach().clone().float().requires_grad_()
            images = decode(x0_of(x))
            loss = torch.stack([goal.loss(images).sum() for goal in self.goals]).sum()
            (gradient,) = torch.autograd.grad(loss, x)
        length = torch.linalg.vector_norm(gradient.flatten(1), dim=1).view(-1, *[1] * (x.ndim - 1))
        usable = torch.isfinite(length) & (length > 0)
        shift = torch.where(usable, self.step * gradient / length, torch.zeros_like(gradient))
        return shift.to(x_t.dtype)
