"""Go on with the decoder alone: `python -m training.decoder`. Resumes from its last checkpoint.

The encoder stays as it is, so latents mean what they meant, and pool, base and LoRAs stay valid: this can run at any
time after the autoencoder and before the judge, beside the training of the base too. It puts the result in place of the
decoder of the work folder, and of the release if there is one.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn.functional import l1_loss, mse_loss

from training.autoencoder import base_picture, edges, show
from training.drawing.pictures import render
from training.fit import fit
from training.networks import RELEASE, WORK, as_tensor, forget_origin
from training.parallel import part_of, run_workers

BATCH = 8
RATE = 1.5e-3
MOST_NOISE = 0.15
"""Latents get noise of a deviation between 0 and this; their own is 1."""


def pictures(step: int, part: range) -> torch.Tensor:
    """Whole pictures of this step."""
    drawn = []
    for i in part:
        spec, seed = base_picture(13, step, i)
        drawn.append(render(*spec, seed))
    return as_tensor(np.stack(drawn))


def loss_of(vae: AutoencoderKL, shown: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """Error of the pictures and of their edges, from noisy latents."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            latents = vae.encode(shown).latent_dist.mean.float()
        spread = MOST_NOISE * torch.rand((len(shown), 1, 1, 1), generator=noise)
        seen = vae.decode(latents + spread * torch.randn(latents.shape, generator=noise)).sample.float()
    return 2 * mse_loss(seen, shown) + 0.5 * l1_loss(seen, shown) + 0.3 * l1_loss(edges(seen), edges(shown))


def put(vae: AutoencoderKL) -> None:
    """Save it where it is used."""
    vae.save_pretrained(WORK / "vae")
    shipped = RELEASE / "model" / "vae"
    if shipped.exists():
        copy.deepcopy(vae).to(torch.float16).save_pretrained(shipped)
        forget_origin(shipped)


def work(rank: int, total: int, source: Path) -> None:
    """One of the training processes; the first also saves."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(source).to(memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def loss_at(step: int) -> torch.Tensor:
        return loss_of(vae, pictures(step, part_of(BATCH, rank)), torch.Generator().manual_seed(2 * step + rank))

    average = fit(vae, loss_at, rank, total, RATE, WORK / "decoder.pt")
    if rank == 0:
        put(average)
        show(average, WORK / "samples" / "decoder.png")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    run_workers(work, args.steps, WORK / "vae")


if __name__ == "__main__":
    main()
