"""Scores of a picture: cosines of CLIP and DINO features with those of reference pictures (K-LoRA, Table 1)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from klora.errors import KloraError
from klora.evaluation.identity import file_digest, identity_of
from klora.evaluation.study import StudyPair
from klora.generation.pipeline import quiet_libraries
from klora.text import first_line
from klora.vision import VisionModel, load_clip, load_dino

if TYPE_CHECKING:
    from PIL.Image import Image


class Scorer(Protocol):
    """What gives a picture its scores.

    `metrics` are headings by name, each score a fraction; `in_harmonic_mean` are the names of those whose harmonic
    mean is reported, `in_sum` of those whose sum is, where there are any.
    """

    metrics: Mapping[str, str]
    in_harmonic_mean: Sequence[str]
    in_sum: Sequence[str]

    def key(self, pair: StudyPair) -> str:
        """A digest of all that decides the scores of this pair's pictures, but for the pictures."""

    def __call__(self, image: Image, pair: StudyPair) -> dict[str, float]:
        """Every metric of a picture of `pair`."""


def mean_cosine(features: Tensor, references: Tensor) -> float:
    """The mean cosine over all pairs of a row of `features` (n, d) and one of `references` (m, d)."""
    a, b = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (features, references))
    return float((a @ b.T).mean())


class ClipDino:
    """Style similarity, CLIP score and DINO score, as in K-LoRA's Table 1."""

    metrics: Mapping[str, str] = {
        "style_similarity": "style similarity",
        "clip_score": "CLIP score",
        "dino_score": "DINO score",
    }
    in_harmonic_mean: Sequence[str] = ("style_similarity", "clip_score", "dino_score")
    in_sum: Sequence[str] = ("style_similarity", "clip_score")
    """K-LoRA's appendix F compares settings by this sum of CLIP similarities."""

    def __init__(self, clip: str, dino: str, device: str) -> None:
        """Load both models, folders or hub ids; KloraError naming the option of the one that cannot be."""
        self.clip, self.dino = _load("--clip", load_clip, clip, device), _load("--dino", load_dino, dino, device)
        self._identities = identity_of(clip), identity_of(dino)
        self._references: dict[tuple[int, tuple[Path, ...]], Tensor] = {}

    def key(self, pair: StudyPair) -> str:
        """A digest of both models and of the pair's reference pictures."""
        files = (*pair.subject.references, *pair.style.references)
        digests = [file_digest(path) for path in files]
        text = repr((*self._identities, len(pair.subject.references), digests))
        return hashlib.sha256(text.encode()).hexdigest()

    def __call__(self, image: Image, pair: StudyPair) -> dict[str, float]:
        """The mean cosines of one picture with all references of its style and of its subject."""
        clip, dino = features_of(self.clip, image), features_of(self.dino, image)
        return {
            "style_similarity": mean_cosine(clip, self._of(self.clip, pair.style.references)),
            "clip_score": mean_cosine(clip, self._of(self.clip, pair.subject.references)),
            "dino_score": mean_cosine(dino, self._of(self.dino, pair.subject.references)),
        }

    def _of(self, model: VisionModel, files: tuple[Path, ...]) -> Tensor:
        """The features of reference pictures, computed once."""
        key = (id(model), files)
        if key not in self._references:
            self._references[key] = torch.cat([features_of(model, _open(file)) for file in files])
        return self._references[key]


def _load(option: str, load: Callable[[str, str], VisionModel], model: str, device: str) -> VisionModel:
    try:
        with quiet_libraries():
            found = load(model, device)
    except KloraError as error:
        raise KloraError(f"{option} {error}") from error
    if found.processor is None:
        raise KloraError(f"{option} {model}: has no preprocessor_config.json; add the one that came with the model")
    return found


@torch.inference_mode()
def features_of(model: VisionModel, image: Image) -> Tensor:
    """One row of features of a picture, prepared as the model's makers do, in fp32 on the CPU."""
    inputs = model.processor(images=[image.convert("RGB")], return_tensors="pt")
    return model(inputs["pixel_values"]).float().cpu()


def _open(path: Path) -> Image:
    from PIL import Image as Images

    try:
        with Images.open(path) as image:
            picture: Image = image.convert("RGB")
            return picture
    except OSError as error:
        raise KloraError(f"{path}: cannot be read as a picture ({first_line(error)}); replace it") from None
