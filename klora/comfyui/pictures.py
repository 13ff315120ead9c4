"""Pictures as ComfyUI passes them from node to node."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from klora.errors import KloraError

if TYPE_CHECKING:
    from PIL.Image import Image


def check_drawing() -> None:
    """KloraError where there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise KloraError("pictures need matplotlib; install it into the Python that runs ComfyUI, and start it again")


def image_tensor(picture: Image) -> Tensor:
    """An IMAGE (1, height, width, 3), fp32 in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]
