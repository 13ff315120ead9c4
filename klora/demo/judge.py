"""A small classifier that says which subject and which style a demo picture shows, or that it cannot tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

SIZE = 32
"""Pixels of a side of what the judge looks at."""
SUBJECT_NAMES = ("bolt", "mimi", "comet", "robot", "cat", "rocket", "house", "tree", "fish", "mushroom", "car")
"""The three named subjects, then the families for any other member of them."""
STYLE_NAMES = ("popart", "neon", "parchment", "plain", "stripes", "bands", "dots", "checks", "grid")
"""The three named styles, then the background patterns for any other style."""

_WEIGHTS = Path(__file__).with_name("judge.safetensors")


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in one picture; a name is None where its probability is below the floor."""

    subject: str | None
    style: str | None
    subjects: dict[str, float]
    styles: dict[str, float]


class JudgeNet(nn.Module):
    """Four convolutions and one linear layer for each axis; input (n, 3, 32, 32) in [-1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 96)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2))
        self.subject = nn.Linear(96 * 16, len(SUBJECT_NAMES))
        self.style = nn.Linear(96 * 16, len(STYLE_NAMES))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the subject and of the style."""
        features = self.body(x)
        return self.subject(features), self.style(features)


def as_batch(images: np.ndarray | Sequence[Image.Image | np.ndarray]) -> torch.Tensor:
    """uint8 arrays (h, w, 3) or PIL images of any size → (n, 3, 32, 32) in [-1, 1]."""
    size = (SIZE, SIZE)
    arrays = []
    for image in images:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image, dtype=np.uint8))
        picture = picture.convert("RGB")
        arrays.append(np.asarray(picture if picture.size == size else picture.resize(size, Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Judge:
    """`Judge.load()` and then `judge(images)`."""

    def __init__(self, net: JudgeNet, floor: float) -> None:
        self.net, self.floor = net.eval(), floor

    @classmethod
    def load(cls, file: Path = _WEIGHTS) -> Judge:
        """The judge that ships with the package. Raises FileNotFoundError if its weights are missing."""
        net = JudgeNet()
        with safe_open(file, "pt") as stored:
            state = {k: stored.get_tensor(k).float() for k in stored.keys()}  # noqa: SIM118
            floor = float(stored.metadata()["floor"])
        net.load_state_dict(state, strict=False)  # only the batch counters are not stored
        return cls(net, floor)

    @torch.inference_mode()
    def __call__(self, images: np.ndarray | Sequence[Image.Image | np.ndarray]) -> list[Verdict]:
        """One verdict per picture; pictures are uint8 arrays (h, w, 3) or PIL images."""
        subjects, styles = (logits.softmax(-1).tolist() for logits in self.net(as_batch(images)))
        return [self._verdict(a, b) for a, b in zip(subjects, styles, strict=True)]

    def _verdict(self, subject: list[float], style: list[float]) -> Verdict:
        subjects, styles = dict(zip(SUBJECT_NAMES, subject, strict=True)), dict(zip(STYLE_NAMES, style, strict=True))
        best = [max(table, key=table.__getitem__) for table in (subjects, styles)]
        return Verdict(
            best[0] if subjects[best[0]] >= self.floor else None,
            best[1] if styles[best[1]] >= self.floor else None,
            subjects,
            styles,
        )
