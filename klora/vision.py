"""CLIP and DINO, which compare pictures with references: loaded here for evaluation and guidance alike."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from klora.errors import KloraError
from klora.hub import ModelSource, find_model
from klora.text import first_line

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Colour = tuple[float, ...]
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class VisionModel:
    """A vision model on its device, without gradients of its own; `processor` is None in a folder that has none."""

    net: nn.Module
    processor: Any
    features: Callable[[nn.Module, Tensor], Tensor]
    usual: tuple[Colour, Colour]

    def __call__(self, pixels: Tensor) -> Tensor:
        """From prepared pixel values (B, 3, H, W) to features (B, d); gradients pass."""
        weight = next(self.net.parameters())
        return self.features(self.net, pixels.to(weight.device, weight.dtype))

    @property
    def size(self) -> int:
        """Pixels of a side of what the model sees."""
        config: Any = self.net.config
        size = config.image_size
        return size if isinstance(size, int) else min(size)

    @property
    def mean_and_std(self) -> tuple[Colour, Colour]:
        """Of each colour channel, what is subtracted and divided by."""
        mean, std = (getattr(self.processor, name, None) for name in ("image_mean", "image_std"))
        return (tuple(mean), tuple(std)) if mean and std else self.usual


@lru_cache(maxsize=1)
def load_clip(model: str, device: str) -> VisionModel:
    """The image half of a CLIP, a folder or a hub id: its features in the space that it shares with text.

    Raises KloraError where it cannot be loaded.
    """
    return _load(_read_clip, model, device, _clip_features, _CLIP)


@lru_cache(maxsize=1)
def load_dino(model: str, device: str) -> VisionModel:
    """DINO, or another ViT, a folder or a hub id: the [CLS] token of its last layer; KloraError as `load_clip`."""
    return _load(_read_dino, model, device, _cls_token, _IMAGENET)


def _load(
    read: Callable[[ModelSource], Any],
    model: str,
    device: str,
    features: Callable[[nn.Module, Tensor], Tensor],
    usual: tuple[Colour, Colour],
) -> VisionModel:
    if importlib.util.find_spec("transformers") is None:
        raise KloraError('comparing with references needs transformers; pip install "klora[demo]"')
    source = find_model(model)
    try:
        # Hosts sample in inference mode, and gradients must pass.
        with torch.inference_mode(False):
            net = read(source).to(device).eval().requires_grad_(False)
        return VisionModel(net, _processor(source), features, usual)
    # What is wrong with a model reaches us as errors of any kind.
    except Exception as error:
        raise KloraError(f"{model}: cannot be loaded ({first_line(error)}); give another folder or hub id") from error


def _read_clip(source: ModelSource) -> Any:
    from transformers import AutoConfig, CLIPVisionModelWithProjection

    config = source.load(AutoConfig)
    if hasattr(config, "vision_config"):
        # Of a whole CLIP, the image half; how wide its features are is said for both halves alone.
        config.vision_config.projection_dim = config.projection_dim
        config = config.vision_config
    return source.load(CLIPVisionModelWithProjection, config=config)


def _read_dino(source: ModelSource) -> Any:
    from transformers import AutoModel

    return source.load(AutoModel)


def _processor(source: ModelSource) -> Any:
    from transformers import AutoImageProcessor

    try:
        return source.load(AutoImageProcessor)
    except (OSError, ValueError):
        return None


def _clip_features(net: nn.Module, pixels: Tensor) -> Tensor:
    features: Tensor = net(pixel_values=pixels).image_embeds
    return features


def _cls_token(net: nn.Module, pixels: Tensor) -> Tensor:
    features: Tensor = net(pixel_values=pixels).last_hidden_state[:, 0]
    return features
