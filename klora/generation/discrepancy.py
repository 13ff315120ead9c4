"""EST-LoRA's style discrepancy d: the cosine of DINO's features of what each LoRA alone makes (arXiv 2508.02165)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from klora.generation.generate import GeneratedPicture, generate
from klora.generation.request import GenerationRequest
from klora.hosts.guidance import encode_square
from klora.vision import VisionModel


def probe_pictures(pipe: Any, request: GenerationRequest) -> Iterator[GeneratedPicture]:
    """One picture with the subject alone, then one with the style alone: the prompt and the seed of `request`."""
    for subject, style in ((1.0, 0.0), (0.0, 1.0)):
        settings = dataclasses.replace(
            request.settings, policy="direct", subject_strength=subject, style_strength=style
        )
        alone = dataclasses.replace(request, settings=settings)
        yield from generate(pipe, alone, [request.seed], lambda _number, _session: None)


def discrepancy(model: VisionModel, subject: Sequence[Tensor], style: Sequence[Tensor]) -> float:
    """d: the mean cosine of all pairs of pictures, (3, H, W) in [0, 1], by the features of `model`; −1 to 1."""
    with torch.no_grad():
        ours, theirs = (
            torch.cat([encode_square(model, image[None]) for image in images]) for images in (subject, style)
        )
        mean = float((F.normalize(ours.double(), dim=1) @ F.normalize(theirs.double(), dim=1).t()).mean())
    return min(1.0, max(-1.0, mean))


def pixels_of(image: Any) -> Tensor:
    """A PIL picture as (3, H, W) in [0, 1]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
