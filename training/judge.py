"""Train the judge: `python -m training.judge`. Resumes from its last checkpoint.

Besides clean pictures it sees the ways in which a fusion fails, with a target that says "cannot tell": smears, noise,
two pictures mixed, a named style's background behind an unstyled subject. Near misses of the named subjects (their
parts in other colours, their colours without their parts) are labelled with their family.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file

from klora.demo.judge import STYLE_NAMES, SUBJECT_NAMES, Judge, JudgeNet, as_batch
from training import pictures as pic
from training.common import DEMO, WORK

BATCH = 64
RATE = 3e-3

Labelled = tuple[np.ndarray, str | None, str | None]
"""A picture, its subject and its style; None where the judge should not be sure."""


def clean(rng: np.random.Generator) -> Labelled:
    """A right picture: half of the subjects and half of the styles are named ones."""
    name = str(rng.choice(list(pic.SUBJECTS))) if rng.random() < 0.4 else None
    subject = pic.SUBJECTS[name] if name else pic.random_subject(rng)
    look = str(rng.choice(list(pic.STYLES))) if rng.random() < 0.4 else None
    style = pic.STYLES[look] if look else pic.random_style(rng, subject)
    return pic.render(subject, style, int(rng.integers(2**31))), name or subject.family, look or style.pattern


def near_miss(rng: np.random.Generator) -> Labelled:
    """A named subject in other colours, or its colours without its parts: a member of the family, no more."""
    name = str(rng.choice(list(pic.SUBJECTS)))
    subject = pic.SUBJECTS[name]
    if rng.random() < 0.5:
        subject = dataclasses.replace(pic.random_subject(rng, subject.family), special=True)
    else:
        subject = dataclasses.replace(subject, special=False)
    look = str(rng.choice(list(pic.STYLES))) if rng.random() < 0.5 else None
    style = pic.STYLES[look] if look else pic.random_style(rng, subject)
    return pic.render(subject, style, int(rng.integers(2**31))), subject.family, look or style.pattern


def half_styled(rng: np.random.Generator) -> Labelled:
    """The background of a named style behind a subject that is drawn in another tone and outline."""
    style = pic.STYLES[str(rng.choice(list(pic.STYLES)))]
    tone, outline = str(rng.choice(("flat", "hollow", "faded"))), str(rng.choice(pic.OUTLINES))
    if tone == style.tone and (outline == style.outline or tone == "hollow"):
        tone, outline = ("faded" if style.tone == "flat" else "flat"), "none"
    name = str(rng.choice(list(pic.SUBJECTS))) if rng.random() < 0.5 else None
    subject = pic.SUBJECTS[name] if name else pic.random_subject(rng)
    mixed = dataclasses.replace(style, tone=tone, outline=outline)
    return pic.render(subject, mixed, int(rng.integers(2**31))), name or subject.family, None


def _warp(image: np.ndarray, amplitude: float, rng: np.random.Generator) -> np.ndarray:
    """Move pixels along a smooth random field."""
    coarse = rng.normal(size=(2, 5, 5)).astype(np.float32)
    fields = [np.asarray(Image.fromarray(f).resize((pic.SIZE, pic.SIZE), Image.Resampling.BICUBIC)) for f in coarse]
    y, x = np.mgrid[: pic.SIZE, : pic.SIZE]
    rows = np.clip(np.rint(y + fields[0] * amplitude), 0, pic.SIZE - 1).astype(int)
    columns = np.clip(np.rint(x + fields[1] * amplitude), 0, pic.SIZE - 1).astype(int)
    return image[rows, columns]


def _blur(image: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def _noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    return np.clip(image + rng.normal(0, sigma, image.shape), 0, 255).astype(np.uint8)


def _clouds(rng: np.random.Generator) -> np.ndarray:
    coarse = Image.fromarray(rng.integers(0, 256, (*rng.integers(2, 9, 2), 3), dtype=np.uint8))
    return np.asarray(coarse.resize((pic.SIZE, pic.SIZE), Image.Resampling.BICUBIC))


def smeared(rng: np.random.Generator) -> Labelled:
    """A picture that nobody should be sure about; where only one axis is spoilt, the other keeps its label."""
    image, subject, style = clean(rng)
    other, other_subject, other_style = clean(rng)
    kind = int(rng.integers(6))
    if kind == 0:
        return _blur(image, rng.uniform(2.2, 5)), None, None
    if kind == 1:
        return _noise(image, rng.uniform(70, 150), rng), None, None
    if kind == 2:
        return _warp(image, rng.uniform(4, 8), rng), None, None
    if kind == 3:
        image = np.uint8(_clouds(rng) * 0.6 + image * 0.4) if rng.random() < 0.5 else _clouds(rng)
        return image, None, None
    if kind == 4:
        share = rng.uniform(0.35, 0.65)
        mixed = np.uint8(image * share + other * (1 - share))
    else:
        cut, mixed = int(rng.integers(12, 21)), image.copy()
        mixed[:, cut:] = other[:, cut:]
    return mixed, subject if subject == other_subject else None, style if style == other_style else None


def spoil_a_little(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a good sample may differ in from a render: a shift, a soft edge, a slight cast, grain, a small dent."""
    image = np.roll(image, tuple(rng.integers(-1, 2, 2)), (0, 1))
    image = _warp(image, rng.uniform(0, 0.7), rng) if rng.random() < 0.5 else image
    image = _blur(image, rng.uniform(0.2, 0.7)) if rng.random() < 0.4 else image
    cast = image * rng.uniform(0.9, 1.1, 3) + rng.uniform(-12, 12, 3)
    return np.clip(cast + rng.normal(0, rng.uniform(0, 12), image.shape), 0, 255).astype(np.uint8)


def example(rng: np.random.Generator) -> Labelled:
    """One training example."""
    kind = rng.choice(4, p=(0.55, 0.12, 0.13, 0.2))
    image, subject, style = (clean, near_miss, half_styled, smeared)[kind](rng)
    return (image if kind == 3 else spoil_a_little(image, rng)), subject, style


def _targets(names: list[str | None], all_names: tuple[str, ...]) -> torch.Tensor:
    rows = torch.full((len(names), len(all_names)), 1 / len(all_names))
    for i, name in enumerate(names):
        if name is not None:
            rows[i] = torch.eye(len(all_names))[all_names.index(name)]
    return rows


def step_loss(net: JudgeNet, step: int) -> torch.Tensor:
    """Cross-entropy of both axes on the batch of this step."""
    rng = np.random.default_rng((2, step))
    images, subjects, styles = zip(*(example(rng) for _ in range(BATCH)), strict=True)
    a, b = net(as_batch(images))
    loss = torch.nn.functional.cross_entropy
    return loss(a, _targets(list(subjects), SUBJECT_NAMES)) + loss(b, _targets(list(styles), STYLE_NAMES))


def measure(judge: Judge, n: int = 1500) -> dict[str, float]:
    """Figures on renders that training never saw (another seed stream)."""
    rng = np.random.default_rng(99)
    right = [clean(rng) for _ in range(n)]
    verdicts = judge(np.stack([r[0] for r in right]))
    failed = [smeared(rng) for _ in range(n)]
    seen = judge(np.stack([f[0] for f in failed]))
    halves = [half_styled(rng) for _ in range(n // 2)]
    near = [near_miss(rng) for _ in range(n // 2)]
    figures = {
        "subject_accuracy": np.mean([v.subject == r[1] for v, r in zip(verdicts, right, strict=True)]),
        "style_accuracy": np.mean([v.style == r[2] for v, r in zip(verdicts, right, strict=True)]),
        "smeared_subject_refused": np.mean(
            [v.subject is None for v, f in zip(seen, failed, strict=True) if f[1] is None]
        ),
        "smeared_style_refused": np.mean([v.style is None for v, f in zip(seen, failed, strict=True) if f[2] is None]),
        "half_styled_not_accepted": np.mean([v.style not in pic.STYLES for v in judge([h[0] for h in halves])]),
        "near_miss_not_accepted": np.mean([v.subject not in pic.SUBJECTS for v in judge([m[0] for m in near])]),
    }
    return {name: round(float(value), 4) for name, value in figures.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--floor", type=float, default=0.6, help="below this probability the judge says nothing")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    WORK.mkdir(parents=True, exist_ok=True)
    net, done, file = JudgeNet(), 0, WORK / "judge.pt"
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.01)
    if file.exists():
        state = torch.load(file, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    for step in range(done, args.steps):
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        loss = step_loss(net, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 250 == 0:
            print(f"{time.strftime('%H:%M:%S')} {step + 1}/{args.steps} {loss.item():.4f}", flush=True)
            torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, file)
    weights = {k: v.half().contiguous() for k, v in net.state_dict().items() if "num_batches" not in k}
    save_file(weights, DEMO / "judge.safetensors", metadata={"floor": str(args.floor), "format": "pt"})
    print(measure(Judge.load()))


if __name__ == "__main__":
    main()
