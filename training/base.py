"""Train the base model: `python -m training.base`. Resumes from its last checkpoint.

The text encoder and the U-Net are trained together on pictures drawn on the fly.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch

from klora.demo import pictures as pic
from training.common import (
    DEMO,
    WORK,
    base_caption,
    draw_timesteps,
    make_pipeline,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    paint,
    sheet,
    to_latents,
    tokenize,
)

BATCH = 16
RATE = 1e-3
SAMPLES = [
    "a robot",
    "a red and blue robot on yellow",
    "a tall round purple and white robot with black outline on green and white checks",
    "a wide sharp green and yellow robot hollow on black and red bands",
    "a cat",
    "a orange and white cat on blue and cyan stripes",
    "a tall round blue and pink rocket with white outline on red and black dots",
    "a green and brown tree faded with brown outline on pink and white grid",
    "a house on navy",
    "a wide round cyan and pink fish",
    "a mushroom in szn style",
    "a sbu car",
]


def batch(step: int) -> tuple[np.ndarray, list[str]]:
    """Pictures and captions of one step, a function of the step alone, so that a resumed run sees the same ones."""
    rng = np.random.default_rng((1, step))
    images, captions = [], []
    for _ in range(BATCH):
        subject = pic.random_subject(rng)
        style = pic.random_style(rng, subject)
        images.append(pic.render(subject, style, int(rng.integers(2**31))))
        captions.append(base_caption(subject, style, rng))
    return np.stack(images), captions


class Trainer:
    """Models, optimizer and moving average; saved and restored as one file."""

    def __init__(self, folder: Path, total: int) -> None:
        torch.manual_seed(0)
        self.file, self.total, self.step = folder / "base.pt", total, 0
        self.tokenizer = make_tokenizer(folder / "tokenizer")
        self.nets = torch.nn.ModuleDict({"unet": make_unet(), "text": make_text_encoder(self.tokenizer)})
        self.average = copy.deepcopy(self.nets).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.nets.parameters(), lr=RATE, weight_decay=0.01)
        self.scheduler = make_scheduler()
        if self.file.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.file, weights_only=True)
        self.step = state["step"]
        self.nets.load_state_dict(state["nets"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])

    def save(self) -> None:
        """Write the checkpoint in one move, so that an interrupted write loses nothing."""
        state = {"step": self.step, "nets": self.nets.state_dict(), "average": self.average.state_dict()}
        torch.save(state | {"optimizer": self.optimizer.state_dict()}, self.file.with_suffix(".new"))
        self.file.with_suffix(".new").replace(self.file)

    def rate(self) -> float:
        """Linear warm-up, then cosine to zero."""
        return RATE * min(1.0, (self.step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * self.step / self.total))

    def advance(self) -> float:
        """One optimizer step; the loss."""
        images, captions = batch(self.step)
        noise_rng = torch.Generator().manual_seed(self.step)
        clean = to_latents(images)
        noise = torch.randn(clean.shape, generator=noise_rng)
        t = draw_timesteps(len(clean), noise_rng)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        with torch.autocast("cpu", torch.bfloat16):
            text = self.nets["text"](tokenize(self.tokenizer, captions))[0]
            guess = self.nets["unet"](self.scheduler.add_noise(clean, noise, t), t, text).sample
        target = self.scheduler.get_velocity(clean, noise, t)
        loss = torch.nn.functional.mse_loss(guess.float(), target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.nets.parameters(), 1.0)
        self.optimizer.step()
        decay = min(0.999, (self.step + 1) / (self.step + 10))
        pairs = zip(self.average.parameters(), self.nets.parameters(), strict=True)
        with torch.no_grad():
            torch._foreach_lerp_(*map(list, zip(*pairs, strict=True)), 1 - decay)
        self.step += 1
        return loss.item()

    def pipeline(self):
        """The pipeline of the averaged weights."""
        nets = copy.deepcopy(self.average).eval()
        return make_pipeline(nets["unet"], nets["text"], self.tokenizer)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000, help="pictures seen in all")
    parser.add_argument("--save-every", type=float, default=180, help="seconds between checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(2)
    WORK.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(WORK, args.samples // BATCH)
    saved, losses = time.time(), []
    while trainer.step < trainer.total:
        losses.append(trainer.advance())
        if trainer.step % 50 == 0:
            print(f"{time.strftime('%H:%M:%S')} {trainer.step}/{trainer.total} {np.mean(losses[-50:]):.4f}", flush=True)
        if time.time() - saved > args.save_every:
            trainer.save()
            pictures = paint(trainer.pipeline(), SAMPLES, seed=0)
            sheet([list(pictures[:6]), list(pictures[6:])], WORK / "samples" / f"base-{trainer.step:05d}.png")
            saved = time.time()
    trainer.save()
    trainer.pipeline().to(dtype=torch.float16).save_pretrained(DEMO / "model", safe_serialization=True)
    print(f"saved {DEMO / 'model'}")


if __name__ == "__main__":
    main()
