"""A small classifier that says which subject and which style a demo picture shows, or that it cannot tell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

SIZE = 64
"""Pixels of a side of what the judge looks at."""
_WIDTHS = (3, 32, 64, 96, 128)
_FINE, _COARSE = 12, 18
"""Layers down to the map of 16×16, where a cell knows its piece of texture, and to that of 8×8."""
_WEIGHTS = Path(__file__).with_name("judge.safetensors")


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in one picture; a name is None where its probability is below the floor."""

    subject: str | None
    style: str | None
    subjects: dict[str, float]
    styles: dict[str, float]


class JudgeNet(nn.Module):
    """Convolutions down to 4×4 and a linear layer for each axis; input (n, 3, 64, 64) in [-1, 1].

    The style is read from means and maxima over the picture, as a texture has no place; the subject from a 4×4 map.
    """

    def __init__(self, subjects: int, styles: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in pairwise(_WIDTHS):
            layers += [nn.Conv2d(a, b, 5 if a == 3 else 3, stride=2, padding=2 if a == 3 else 1), nn.BatchNorm2d(b)]
            layers += [nn.ReLU()]
            if b < _WIDTHS[-1]:
                layers += [nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        self.body, self.drop = nn.Sequential(*layers), nn.Dropout(0.2)
        self.subject = nn.Linear(_WIDTHS[-1] * 16, subjects)
        self.style = nn.Sequential(nn.Linear(2 * (_WIDTHS[2] + _WIDTHS[3]), 96), nn.ReLU(), nn.Linear(96, styles))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the subject and of the style."""
        fine = self.body[:_FINE](x)
        coarse = self.body[_FINE:_COARSE](fine)
        pooled = torch.cat([pool((2, 3)) for map_ in (fine, coarse) for pool in (map_.mean, map_.amax)], 1)
        features = self.body[_COARSE:](coarse).flatten(1)
        return self.subject(self.drop(features)), self.style(self.drop(pooled))


def as_batch(images: np.ndarray | Sequence[Image.Image | np.ndarray]) -> torch.Tensor:
    """uint8 arrays (h, w, 3) or PIL images of any size → (n, 3, 64, 64) in [-1, 1]."""
    size = (SIZE, SIZE)
    arrays = []
    for image in images:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image, dtype=np.uint8))
        picture = picture.convert("RGB")
        arrays.append(np.asarray(picture if picture.size == size else picture.resize(size, Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


_SCALE = "scale:"


def pack(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is stored of a network's weights: 8 bits each and a scale for each output channel; vectors in fp16."""
    stored: dict[str, torch.Tensor] = {}
    for name, weight in state.items():
        if weight.ndim < 2:
            stored[name] = weight.half()
            continue
        scale = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True).clamp_min(1e-9) / 127
        stored |= {name: (weight / scale).round().to(torch.int8), _SCALE + name: scale}
    return stored


def unpack(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that `pack` stored, in fp32."""
    return {k: v.float() * stored.get(_SCALE + k, 1) for k, v in stored.items() if not k.startswith(_SCALE)}


class Judge:
    """`Judge.load()` and then `judge(images)`."""

    def __init__(self, net: JudgeNet, subjects: Sequence[str], styles: Sequence[str], floor: float) -> None:
        self.net, self.subjects, self.styles, self.floor = net.eval(), tuple(subjects), tuple(styles), floor

    @classmethod
    def load(cls, file: Path = _WEIGHTS) -> Judge:
        """Read weights and names, by default of the judge that ships. Raises FileNotFoundError if they are missing."""
        with safe_open(file, "pt") as stored:
            state = unpack({k: stored.get_tensor(k) for k in stored.keys()})  # noqa: SIM118
            metadata = stored.metadata()
        subjects, styles = json.loads(metadata["subjects"]), json.loads(metadata["styles"])
        net = JudgeNet(len(subjects), len(styles))
        net.load_state_dict(state, strict=False)  # only the batch counters are not stored
        return cls(net, subjects, styles, float(metadata["floor"]))

    @torch.inference_mode()
    def __call__(self, images: np.ndarray | Sequence[Image.Image | np.ndarray]) -> list[Verdict]:
        """One verdict per picture; pictures are uint8 arrays (h, w, 3) or PIL images."""
        subjects, styles = (logits.softmax(-1).tolist() for logits in self.net(as_batch(images)))
        return [self._verdict(a, b) for a, b in zip(subjects, styles, strict=True)]

    def _verdict(self, subject: list[float], style: list[float]) -> Verdict:
        tables = dict(zip(self.subjects, subject, strict=True)), dict(zip(self.styles, style, strict=True))
        best = [max(table, key=table.__getitem__) for table in tables]
        named = [name if table[name] >= self.floor else None for name, table in zip(best, tables, strict=True)]
        return Verdict(named[0], named[1], *tables)
