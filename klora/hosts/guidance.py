"""The reference guidance that settings ask for: the pictures, and the models that compare with them."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from klora.engine.guidance import Goal, ReferenceGuidance
from klora.errors import KloraError, SettingsError
from klora.fusion.policies import POLICIES
from klora.settings import Settings
from klora.text import first_line
from klora.vision import IMAGE_SUFFIXES, VisionModel, load_clip, load_dino


def make_guidance(settings: Settings, device: torch.device | str) -> ReferenceGuidance | None:
    """Make what `settings` ask for; None without references, or under a policy that takes none.

    Raises SettingsError for references that cannot be read and models that cannot be loaded.
    """
    if not POLICIES[settings.policy].takes_references or not (settings.style_refs or settings.subject_refs):
        return None
    if settings.refine_from > settings.refine_to:
        raise SettingsError("refine_from", f"{settings.refine_from:g} lies behind refine_to, {settings.refine_to:g}")
    goals = []
    for refs, model, load, weight in (
        ("style_refs", "clip_model", load_clip, settings.style_pull),
        ("subject_refs", "dino_model", load_dino, settings.subject_pull),
    ):
        if getattr(settings, refs) and weight:
            images = read_images(refs, getattr(settings, refs))
            try:
                encode = partial(encode_square, load(getattr(settings, model), str(device)))
            except KloraError as error:
                raise SettingsError(model, str(error)) from error
            with torch.inference_mode(False), torch.no_grad():
                references = torch.cat([encode(image[None]) for image in images])
            goals.append(Goal(encode, references, weight))
    return ReferenceGuidance(goals, settings.refine_step, settings.refine_from, settings.refine_to) if goals else None


def encode_square(model: VisionModel, images: Tensor) -> Tensor:
    """Features (B, d) of the central square of images (B, 3, H, W) in [0, 1]; gradients pass."""
    images = images.to(next(model.net.parameters()).device)
    side = min(images.shape[-2:])
    top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
    square = images[..., top : top + side, left : left + side].float()
    square = F.interpolate(square, (model.size, model.size), mode="bicubic", antialias=True, align_corners=False)
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=images.device).view(3, 1, 1) for values in model.mean_and_std
    )
    return model((square - mean) / std)


def read_images(setting: str, given: str) -> list[Tensor]:
    """Read an image, or all of a folder, or several of either with ; between: (3, H, W) in [0, 1] each."""
    return [_read_image(setting, path) for path in reference_files(setting, given)]


def reference_files(setting: str, given: str) -> list[Path]:
    """The pictures that a setting names; SettingsError for a folder without any."""
    paths: list[Path] = []
    for part in filter(None, (part.strip() for part in given.split(";"))):
        path = Path(os.path.expanduser(part))
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise SettingsError(setting, f"{path} holds no picture ({', '.join(IMAGE_SUFFIXES)})")
        paths += found
    return paths


def _read_image(setting: str, path: Path) -> Tensor:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise SettingsError(setting, f"{path} cannot be read as a picture ({first_line(error)})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
