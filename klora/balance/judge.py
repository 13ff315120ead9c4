"""The parts of a pair's LoRAs in pictures. A host gives a `Model`; nothing here knows what kind of host it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from statistics import fmean
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from klora.balance.gain import gain
from klora.balance.parts import Parts, part

Who = Literal["base", "subject", "style"]
"""What acts in a model: no LoRA, the subject's alone, or the style's alone, each with its own strength."""

ALONE: Mapping[Who, Mapping[str, Any]] = {
    "subject": {"policy": "direct", "preset": "1,1", "share": None, "style_strength": 0.0},
    "style": {"policy": "direct", "preset": "1,1", "share": None, "subject_strength": 0.0},
}
"""The settings that make a fusion one LoRA alone."""

Denoise = Callable[[Tensor, Tensor, float], Tensor]
"""From a picture's latents x0 (1, …), noise ε of their shape and a place τ of sampling to the x0 that the model sees in
their mixture there."""

OnForward = Callable[[int, int], None]
"""Is told how many forwards of the denoiser have been made, of how many."""


class Model(Protocol):
    """A loaded model with a pair of LoRAs, as far as judging needs it."""

    def acting(self, who: Who) -> AbstractContextManager[Denoise]:
        """Have `who` act, under its own prompt, inside the block; the model is as before afterwards."""


def forwards(pictures: int, places: int) -> int:
    """How many forwards of the denoiser, each of one picture without guidance, judging takes."""
    return 3 * pictures * places


def judge(
    model: Model, pictures: Sequence[Tensor], places: Sequence[float], on_forward: OnForward | None = None
) -> list[Parts]:
    """The parts of both LoRAs in `pictures`, latents (1, …), judged at `places` τ of sampling.

    At each place all pictures of one shape are under the same noise, so that what they differ by is theirs.
    """
    total, done = forwards(len(pictures), len(places)), 0

    def seen(who: Who) -> list[list[Tensor]]:
        nonlocal done
        found: list[list[Tensor]] = []
        with model.acting(who) as denoise:
            for clean in pictures:
                found.append([])
                for number, tau in enumerate(places):
                    found[-1].append(denoise(clean, _noise(clean, number), tau))
                    done += 1
                    if on_forward:
                        on_forward(done, total)
        return found

    base = seen("base")

    def parts(who: Who) -> list[float]:
        return [
            fmean(part(gain(clean, *both)) for both in zip(without, with_it, strict=True))
            for clean, without, with_it in zip(pictures, base, seen(who), strict=True)
        ]

    return [Parts(*both) for both in zip(parts("subject"), parts("style"), strict=True)]


def _noise(like: Tensor, number: int) -> Tensor:
    # On the CPU whatever the device, so that what is found on one is found on another.
    generator = torch.Generator("cpu").manual_seed(number)
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu")
    return noise.to(like.device)
