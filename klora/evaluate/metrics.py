"""Scores of a picture: cosines of CLIP and DINO features with those of reference pictures (K-LoRA, Table 1)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from klora.errors import KloraError
from klora.evaluate.identity import identity_of
from klora.evaluate.study import StudyPair
from klora.generate import first_line, quiet_libraries

if TYPE_CHECKING:
    from PIL.Image import Image


class Scorer(Protocol):
    """What gives a picture its scores.

    `metrics` are headings by name, each score a fraction; `balanced` names those whose harmonic mean is reported.
    """

    metrics: Mapping[str, str]
    balanced: Sequence[str]

    def key(self, pair: StudyPair) -> str:
        """Give a digest of all that decides the scores of this pair's pictures, but for the pictures."""

    def __call__(self, image: Image, pair: StudyPair) -> dict[str, float]:
        """Give every metric of a picture of `pair`."""


def mean_cosine(features: Tensor, references: Tensor) -> float:
    """Give the mean cosine over all pairs of a row of `features` (n, d) and one of `references` (m, d)."""
    a, b = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (features, references))
    return float((a @ b.T).mean())


class Encoder:
    """A vision model with its own preprocessing: pictures become rows of features."""

    def __init__(self, option: str, model: str, device: str) -> None:
        """Load `model`, a folder or a hub id; `option` is what a KloraError names."""
        self.identity = identity_of(model)
        self.device = device
        local = Path(model).expanduser().is_dir()
        source = str(Path(model).expanduser()) if local else model
        try:
            with quiet_libraries():
                # The model first: of what is asked of an unreachable hub, every file costs its time.
                self.net, self.prepare = self._load(source, local)
        # What is wrong with a model reaches us as errors of any kind.
        except Exception as error:
            cure = "give a folder with the model, or a hub id while online"
            raise KloraError(f"{option} {model}: cannot be loaded ({first_line(error)}); {cure}") from error
        self.net = self.net.to(device).eval()

    def _load(self, source: str, local: bool) -> tuple[Any, Any]:
        raise NotImplementedError

    def _features(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image]) -> Tensor:
        """Give one row of features for each picture, in fp32 on the CPU."""
        inputs = self.prepare(images=[image.convert("RGB") for image in images], return_tensors="pt")
        return self._features(inputs["pixel_values"].to(self.device)).float().cpu()


class ClipEncoder(Encoder):
    """The image features of CLIP, in the space that it shares with text."""

    def _load(self, source: str, local: bool) -> tuple[Any, Any]:
        from transformers import AutoImageProcessor, CLIPModel

        net = CLIPModel.from_pretrained(source, local_files_only=local)
        return net, AutoImageProcessor.from_pretrained(source, local_files_only=local)

    def _features(self, pixels: Tensor) -> Tensor:
        found = self.net.get_image_features(pixel_values=pixels)
        # Since transformers 5 the features come inside an output, whose pooled part they are.
        features: Tensor = getattr(found, "pooler_output", found)
        return features


class DinoEncoder(Encoder):
    """The [CLS] token of the last layer of DINO, or of another ViT."""

    def _load(self, source: str, local: bool) -> tuple[Any, Any]:
        from transformers import AutoImageProcessor, AutoModel

        net = AutoModel.from_pretrained(source, local_files_only=local)
        return net, AutoImageProcessor.from_pretrained(source, local_files_only=local)

    def _features(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.net(pixel_values=pixels).last_hidden_state[:, 0]
        return features


class ClipDino:
    """Style similarity, CLIP score and DINO score, as in K-LoRA's Table 1."""

    metrics: Mapping[str, str] = {
        "style_similarity": "style similarity",
        "clip_score": "CLIP score",
        "dino_score": "DINO score",
    }
    balanced: Sequence[str] = ("style_similarity", "clip_score", "dino_score")

    def __init__(self, clip: str, dino: str, device: str) -> None:
        self.clip = ClipEncoder("--clip", clip, device)
        self.dino = DinoEncoder("--dino", dino, device)
        self._references: dict[tuple[int, tuple[Path, ...]], Tensor] = {}

    def key(self, pair: StudyPair) -> str:
        """Give a digest of both models and of the pair's reference pictures."""
        files = (*pair.subject.references, *pair.style.references)
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
        text = repr((self.clip.identity, self.dino.identity, len(pair.subject.references), digests))
        return hashlib.sha256(text.encode()).hexdigest()

    def __call__(self, image: Image, pair: StudyPair) -> dict[str, float]:
        """Give the mean cosines of one picture with all references of its style and of its subject."""
        clip, dino = self.clip([image]), self.dino([image])
        return {
            "style_similarity": mean_cosine(clip, self._of(self.clip, pair.style.references)),
            "clip_score": mean_cosine(clip, self._of(self.clip, pair.subject.references)),
            "dino_score": mean_cosine(dino, self._of(self.dino, pair.subject.references)),
        }

    def _of(self, encoder: Encoder, files: tuple[Path, ...]) -> Tensor:
        """Give the features of reference pictures, computed once."""
        key = (id(encoder), files)
        if key not in self._references:
            self._references[key] = torch.cat([encoder([_open(file)]) for file in files])
        return self._references[key]


def _open(path: Path) -> Image:
    from PIL import Image as Images

    try:
        with Images.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise KloraError(f"{path}: is no picture that can be read ({first_line(error)}); replace it") from None
