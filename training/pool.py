"""Draw and encode the pictures of the base once: `python -m training.pool`. Goes on after the last finished part.

A step of the base then runs the U-Net alone. The pool is one file of fp16 latents (n, 8, 16, 16); picture i is a
function of i, so that its caption is made anew, in other words, each time it is used.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from diffusers import AutoencoderKL

from training.autoencoder import draw
from training.networks import LATENT_CHANNELS, WORK, as_tensor
from training.parallel import WORKERS, run_workers

SEED = 1
PART = 512
SIDE = 16
FILE = WORK / "pool.npy"


def open_pool() -> np.ndarray:
    """The latents, read from the disk as they are needed."""
    return np.load(FILE, mmap_mode="r")


def _room(pictures: int) -> np.ndarray:
    shape = (pictures, LATENT_CHANNELS, SIDE, SIDE)
    if not FILE.exists():
        np.lib.format.open_memmap(FILE, "w+", np.float16, shape).flush()
    pool = np.load(FILE, mmap_mode="r+")
    if pool.shape != shape:
        raise SystemExit(f"{FILE}: holds {len(pool)} pictures, not {pictures}; delete it to begin anew")
    return pool


def work(rank: int, pictures: int) -> None:
    """Fill every second part that is still empty."""
    vae = AutoencoderKL.from_pretrained(WORK / "vae").eval().to(memory_format=torch.channels_last)
    pool = np.load(FILE, mmap_mode="r+")
    for k, start in enumerate(range(0, pictures, PART)):
        stop = min(start + PART, pictures)
        if k % WORKERS != rank or pool[stop - 1].any():
            continue
        images = as_tensor(np.stack([draw(SEED, i) for i in range(start, stop)]))
        with torch.inference_mode():
            latents = [vae.encode(part).latent_dist.mean for part in images.split(32)]
        pool[start:stop] = torch.cat(latents).half().numpy()
        pool.flush()
        if rank == 0 and k % 16 == 0:
            print(f"{time.strftime('%H:%M:%S')} {stop}/{pictures}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=24_576)
    pictures = parser.parse_args().pictures
    _room(pictures)
    run_workers(work, pictures)


if __name__ == "__main__":
    main()
