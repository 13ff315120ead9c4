"""How much better a LoRA explains a picture than the model does without it.

A LoRA lowers the denoising error on pictures that show what it learned. For a picture x0, under noise ε of level σ,

    G = (‖ε̂_base − ε‖² − ‖ε̂_LoRA − ε‖²) / ‖ε̂_LoRA − ε̂_base‖²

relative to how much it changes at all, so that levels and LoRAs of any strength compare. As ε̂ − ε = (x0 − x̂0)/σ,
whatever the model predicts, σ falls out, and only what is seen in the noise is left: x̂0_base without the LoRA and
x̂0_LoRA with it.
"""

from __future__ import annotations

from torch import Tensor


def gain(clean: Tensor, base: Tensor, lora: Tensor) -> float:
    """G of a picture `clean` (x0) that is seen as `base` without a LoRA and as `lora` with it, all of one shape.

    1 where the picture is what is seen with the LoRA, −1 where it is what is seen without, which also stands for a LoRA
    that changes nothing.
    """
    change, missed = (lora - base).double(), (clean - base).double()
    length = float(change.square().sum())
    return 2 * float((change * missed).sum()) / length - 1 if length else -1.0
