"""Train the base model: `python -m training.base`. Resumes from its last checkpoint.

The text encoder and the U-Net are trained together on the latents of the pool, with captions made anew at every use.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor

from training.autoencoder import base_spec
from training.networks import (
    RELEASE,
    WORK,
    draw_times,
    generate,
    make_pipeline,
    make_scheduler,
    make_text_encoder,
    make_unet,
    save_pipeline,
    sheet,
)
from training.parallel import Pace, average_into, part_of, run_workers, share_gradients, write_checkpoint
from training.pool import SEED, open_pool
from training.words import base_caption, make_tokenizer, tokenize

BATCH = 24
RATE = 1e-3
DECAY = 0.999
COOLING = 0.3
"""The share of the steps in which the rate falls; then it falls once more, from `SECOND` of it."""
SECOND = 0.5
UNIFORM = 2_188
"""The first steps, in which all times are learned alike."""
SAMPLES = [
    "a robot",
    "a red and blue robot on mint",
    "a tall round purple and red robot with white bars on sky",
    "a fancy cat with black bars",
    "a orange and teal cat with brown bricks and thin contour on mist",
    "a tall sharp blue and pink rocket with cream waves and bold contour on sand",
    "a fancy green and yellow fish with navy crosses",
    "a house with white dots on rose",
    "a wide round teal and pink fish with black slants and dashed contour",
    "a tree with brown grain",
    "a sbu car in szn style",
    "a fancy red and yellow rocket with navy grain and thin contour on paper",
]


class Trainer:
    """Models, optimizer and moving average; saved and restored as one file. Every process holds the same."""

    def __init__(self, total: int, more: int, rank: int) -> None:
        torch.manual_seed(0)
        self.part, self.total, self.more, self.step = part_of(BATCH, rank), total, more, 0
        self.file, self.pool = WORK / "base.pt", open_pool()
        with tempfile.TemporaryDirectory() as own:  # a shared folder would be read while the other process writes it
            self.tokenizer = make_tokenizer(Path(own))
        self.nets = torch.nn.ModuleDict({"unet": make_unet(), "text": make_text_encoder(self.tokenizer)})
        self.nets["unet"].set_attn_processor(AttnProcessor())  # its backward is faster than the fused kernel's here
        self.average = copy.deepcopy(self.nets).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.nets.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
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
        """Write the checkpoint. Whatever is random is a function of the step, so that the step is all its state."""
        state = {"step": self.step, "nets": self.nets.state_dict(), "average": self.average.state_dict()}
        write_checkpoint(self.file, state | {"optimizer": self.optimizer.state_dict()})

    def rate(self) -> float:
        """Linear warm-up, constant, and linear to zero over the last steps: until then, the total can be changed.

        What comes after the total begins at half of the rate and falls to zero too.
        """
        if self.step >= self.total:
            return RATE * SECOND * (1 - (self.step - self.total) / self.more)
        left = (self.total - self.step) / (COOLING * self.total)
        return RATE * min(1.0, (self.step + 1) / 200, left)

    def batch(self) -> tuple[torch.Tensor, list[str]]:
        """Latents and captions of this step, a function of step and place: a resumed run sees the same ones."""
        latents, captions = [], []
        for place in self.part:
            rng = np.random.default_rng((3, self.step, place))
            i = int(rng.integers(len(self.pool)))
            latents.append(self.pool[i])
            captions.append(base_caption(*base_spec(SEED, i), rng))
        return torch.from_numpy(np.stack(latents)).float(), captions

    def loss(self) -> torch.Tensor:
        """Mean squared error of v."""
        clean, captions = self.batch()
        noise_rng = torch.Generator().manual_seed(self.step * BATCH + self.part.start)
        noise = torch.randn(clean.shape, generator=noise_rng)
        t = torch.randint(0, 1000, (len(clean),), generator=noise_rng)
        if self.step >= UNIFORM:
            t = draw_times(len(clean), noise_rng)
        with torch.autocast("cpu", torch.bfloat16):
            text = self.nets["text"](tokenize(self.tokenizer, captions))[0]
            guess = self.nets["unet"](self.scheduler.add_noise(clean, noise, t), t, text).sample
        return torch.nn.functional.mse_loss(guess.float(), self.scheduler.get_velocity(clean, noise, t))

    def advance(self) -> float:
        """One optimizer step; the loss."""
        self.optimizer.param_groups[0]["lr"] = self.rate()
        loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        share_gradients(list(self.nets.parameters()))
        torch.nn.utils.clip_grad_norm_(self.nets.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        average_into(self.average, self.nets, min(DECAY, self.step / (self.step + 10)))
        return loss.item()

    def pipeline(self) -> StableDiffusionPipeline:
        """The pipeline of the averaged weights."""
        nets = copy.deepcopy(self.average).eval()
        vae = AutoencoderKL.from_pretrained(WORK / "vae").eval()
        pipe = make_pipeline(vae, nets["unet"], nets["text"], self.tokenizer)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(self) -> None:
        """A sheet of the fixed prompts."""
        pictures = generate(self.pipeline(), SAMPLES, seed=0)
        sheet([list(pictures[:6]), list(pictures[6:])], WORK / "samples" / f"base-{self.step:06d}.png", 3)


def work(rank: int, total: int, more: int, save_every: float) -> None:
    """One of the training processes; the first also saves and draws samples."""
    trainer, end = Trainer(total, more, rank), total + more
    saves, samples = Pace(save_every), Pace(480)
    losses: list[float] = []
    while trainer.step < end:
        losses.append(trainer.advance())
        if rank > 0:
            continue
        if trainer.step % 100 == 0:
            print(f"{time.strftime('%H:%M:%S')} {trainer.step}/{end} {np.mean(losses[-100:]):.4f}", flush=True)
        if saves.due():
            trainer.save()
        if samples.due():
            trainer.sample()
    if rank == 0:
        trainer.save()
        trainer.sample()
        save_pipeline(trainer.pipeline(), RELEASE / "model")
        print(f"saved {RELEASE / 'model'}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=165_000, help="pictures seen")
    parser.add_argument("--more", type=int, default=40_000, help="pictures seen after these, at a falling rate")
    parser.add_argument("--save-every", type=float, default=120, help="seconds between checkpoints")
    args = parser.parse_args()
    run_workers(work, args.samples // BATCH, args.more // BATCH, args.save_every)


if __name__ == "__main__":
    main()
