"""Reference images and the encoders that compare with them: CLIP for the style, DINO for the subject."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from klora.engine.refine import Goal, Refiner
from klora.errors import KloraError, SettingsError
from klora.settings import Settings

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Encoder:
    """A vision model that takes images (B, 3, H, W) in [0, 1] as they are, and passes gradients."""

    net: nn.Module
    features: Callable[[nn.Module, Tensor], Tensor]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Give features (B, d) of the central square of each image."""
        weight = next(self.net.parameters())
        images = images.to(weight.device)
        side = min(images.shape[-2:])
        top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
        square = images[..., top : top + side, left : left + side].float()
        square = F.interpolate(square, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        mean, std = (torch.tensor(values, device=weight.device).view(3, 1, 1) for values in (self.mean, self.std))
        return self.features(self.net, ((square - mean) / std).to(weight.dtype))


def make_refiner(settings: Settings, device: torch.device | str) -> Refiner | None:
    """Make what `settings` ask for; None without references, or under a policy that does not refine.

    Raises SettingsError for references that cannot be read and models that cannot be loaded.
    """
    if settings.policy != "dynamic" or not (settings.style_refs or settings.subject_refs):
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
            encode = _loaded(model, load, getattr(settings, model), str(device))
            with torch.inference_mode(False), torch.no_grad():
                references = torch.cat([encode(image[None]) for image in images])
            goals.append(Goal(encode, references, weight))
    return Refiner(goals, settings.refine_step, settings.refine_from, settings.refine_to) if goals else None


def read_images(setting: str, given: str) -> list[Tensor]:
    """Read an image, or all of a folder, or several of either with ; between: (3, H, W) in [0, 1] each."""
    paths: list[Path] = []
    for part in filter(None, (part.strip() for part in given.split(";"))):
        path = Path(part).expanduser()
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES) if path.is_dir() else [path]
        if not found:
            raise SettingsError(setting, f"{path} holds no picture ({', '.join(IMAGES)})")
        paths += found
    return [_read_image(setting, path) for path in paths]


def _read_image(setting: str, path: Path) -> Tensor:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise SettingsError(setting, f"{path} cannot be read as a picture ({_first_line(error)})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _loaded(setting: str, load: Callable[[str, str], Encoder], model: str, device: str) -> Encoder:
    if importlib.util.find_spec("transformers") is None:
        raise SettingsError(setting, 'comparing with references needs transformers; pip install "klora[demo]"')
    try:
        with torch.inference_mode(False):
            return load(str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model, device)
    except KloraError:
        raise
    # What is wrong with a model reaches us as errors of any kind.
    except Exception as error:
        cure = "give a folder with the model, or a hub id while online"
        raise SettingsError(setting, f"{model} cannot be loaded ({_first_line(error)}); {cure}") from error


@lru_cache(maxsize=1)
def load_clip(model: str, device: str) -> Encoder:
    """Load the image half of a CLIP: its features in the space that it shares with text."""
    from transformers import CLIPVisionModelWithProjection

    net = CLIPVisionModelWithProjection.from_pretrained(model, local_files_only=Path(model).is_dir())
    return _encoder(model, net, _clip_features, _CLIP, device)


@lru_cache(maxsize=1)
def load_dino(model: str, device: str) -> Encoder:
    """Load a DINO, or another ViT: the [CLS] token of its last layer."""
    from transformers import AutoModel

    net = AutoModel.from_pretrained(model, local_files_only=Path(model).is_dir())
    return _encoder(model, net, _cls_token, _IMAGENET, device)


def _clip_features(net: nn.Module, pixels: Tensor) -> Tensor:
    features: Tensor = net(pixel_values=pixels).image_embeds
    return features


def _cls_token(net: nn.Module, pixels: Tensor) -> Tensor:
    features: Tensor = net(pixel_values=pixels).last_hidden_state[:, 0]
    return features


def _encoder(
    model: str,
    net: Any,
    features: Callable[[nn.Module, Tensor], Tensor],
    usual: Sequence[tuple[float, ...]],
    device: str,
) -> Encoder:
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(model, local_files_only=Path(model).is_dir())
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    except (OSError, ValueError, AttributeError):
        # A folder with the model alone.
        mean, std = usual
    size = net.config.image_size
    net = net.to(device).eval().requires_grad_(False)
    return Encoder(net, features, size if isinstance(size, int) else min(size), mean, std)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
