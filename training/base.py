"""Train the base model: `python -m training.base`. Resumes from its last checkpoint.

The text encoder and the U-Net are trained together on pictures drawn on the fly. Two processes of one thread each take
half of every batch: on a busy machine this is faster than one process of two threads, which meet after every operation.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers.models.attention_processor import AttnProcessor

from training import pictures as pic
from training.common import (
    DEMO,
    WORK,
    base_caption,
    draw_timesteps,
    generate,
    make_pipeline,
    make_scheduler,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    save_pipeline,
    sheet,
    to_latents,
    tokenize,
)

BATCH = 16
WORKERS = 2
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


def batch(step: int, part: range) -> tuple[np.ndarray, list[str]]:
    """Pictures and captions of one step, a function of step and place, so that a resumed run sees the same ones."""
    images, captions = [], []
    for i in part:
        rng = np.random.default_rng((1, step, i))
        subject = pic.random_subject(rng)
        style = pic.random_style(rng, subject)
        images.append(pic.render(subject, style, int(rng.integers(2**31))))
        captions.append(base_caption(subject, style, rng))
    return np.stack(images), captions


def share_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average the gradients over the processes; each has the same ones afterwards."""
    gradients = [p.grad for p in parameters]
    flat = torch._utils._flatten_dense_tensors(gradients)
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(mean).div_(WORKERS)


class Trainer:
    """Models, optimizer and moving average; saved and restored as one file. Every process holds the same."""

    def __init__(self, folder: Path, total: int, rank: int) -> None:
        torch.manual_seed(0)
        self.part = range(rank * BATCH // WORKERS, (rank + 1) * BATCH // WORKERS)
        self.file, self.total, self.step = folder / "base.pt", total, 0
        with tempfile.TemporaryDirectory() as own:  # a shared folder would be read while the other process writes it
            self.tokenizer = make_tokenizer(Path(own))
        assert self.tokenizer.tokenize("purple") == ["purple</w>"]
        self.nets = torch.nn.ModuleDict({"unet": make_unet(), "text": make_text_encoder(self.tokenizer)})
        self.nets["unet"].set_attn_processor(AttnProcessor())  # its backward is faster than the fused kernel's here
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
        images, captions = batch(self.step, self.part)
        clean = to_latents(images)
        noise_rng = torch.Generator().manual_seed(self.step * WORKERS + self.part.start)
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
        share_gradients(list(self.nets.parameters()))
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


def work(rank: int, meeting: str, total: int, save_every: float) -> None:
    """One of the training processes; the first also saves and generates samples."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORKERS)
    trainer = Trainer(WORK, total, rank)
    dist.barrier()
    saved = sampled = time.time()
    losses: list[float] = []
    while trainer.step < total:
        losses.append(trainer.advance())
        if rank > 0:
            continue
        if trainer.step % 50 == 0:
            print(f"{time.strftime('%H:%M:%S')} {trainer.step}/{total} {np.mean(losses[-50:]):.4f}", flush=True)
        if time.time() - saved > save_every:
            trainer.save()
            saved = time.time()
        if time.time() - sampled > 600:
            pictures = generate(trainer.pipeline(), SAMPLES, seed=0)
            sheet([list(pictures[:6]), list(pictures[6:])], WORK / "samples" / f"base-{trainer.step:05d}.png")
            sampled = time.time()
    if rank == 0:
        trainer.save()
        save_pipeline(trainer.pipeline(), DEMO / "model")
        print(f"saved {DEMO / 'model'}")
    dist.destroy_process_group()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=192_000, help="pictures seen in all")
    parser.add_argument("--save-every", type=float, default=120, help="seconds between checkpoints")
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (str(Path(folder) / "meeting"), args.samples // BATCH, args.save_every)
        torch.multiprocessing.spawn(work, arguments, nprocs=WORKERS)


if __name__ == "__main__":
    main()
