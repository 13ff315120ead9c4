"""Train the autoencoder: `python -m training.autoencoder`. Resumes from its last checkpoint.

It learns from the pictures that the base learns from, so no named subject or style is among them. The decoder always
gets latents with noise: what a U-Net makes of a latent is never exact, and edges have to be crisp all the same.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn.functional import l1_loss, mse_loss

from training.drawing.pictures import SIZE, render
from training.drawing.styles import GROUNDS, Style, random_style
from training.drawing.subjects import Subject, random_subject
from training.fit import fit
from training.networks import WORK, as_pictures, as_tensor, make_vae, sheet
from training.parallel import part_of, run_workers

BATCH = 12
"""Pictures in a step; two crops of each, or for the last steps a quarter of them whole."""
CROP = 32
WHOLE_FROM = 0.88
RATE = 3e-3
LATENT_NOISE = 0.05
"""In standard deviations of the latents."""

Spec = tuple[Subject, Style, str]


def base_picture(*seed: int) -> tuple[Spec, int]:
    """What a picture of the base shows, and the seed that it is drawn with; a function of `seed`."""
    rng = np.random.default_rng(seed)
    spec = (random_subject(rng), random_style(rng), str(rng.choice(list(GROUNDS))))
    return spec, int(rng.integers(2**31))


def base_spec(*seed: int) -> Spec:
    """What a picture of the base shows."""
    return base_picture(*seed)[0]


def draw(*seed: int) -> np.ndarray:
    """The picture of `base_picture`."""
    spec, picture_seed = base_picture(*seed)
    return render(*spec, picture_seed)


def edges(pictures: torch.Tensor) -> torch.Tensor:
    """Differences of neighbours, across and down, in one row."""
    across, down = pictures[..., 1:] - pictures[..., :-1], pictures[..., 1:, :] - pictures[..., :-1, :]
    return torch.cat([across.flatten(), down.flatten()])


def loss_of(vae: AutoencoderKL, pictures: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """Error of the pictures and of their edges, with a little pull of the latents to a normal distribution."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        mean = posterior.mean.float()
        spread = mean.detach().std((0, 2, 3), keepdim=True)
        latents = mean + LATENT_NOISE * spread * torch.randn(mean.shape, generator=noise)
        seen = vae.decode(latents).sample.float()
    pull = (mean.square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    near = 2 * mse_loss(seen, pictures) + 0.5 * l1_loss(seen, pictures)
    return near + 0.3 * l1_loss(edges(seen), edges(pictures)) + 1e-5 * pull


def batch(step: int, total: int, part: range) -> torch.Tensor:
    """Pictures or crops of this step (n, 3, h, w): crops cost a quarter, and the last steps see what will be asked."""
    if step >= WHOLE_FROM * total:
        return as_tensor(np.stack([draw(11, step, i) for i in part if i % 4 == 0]))
    crops = []
    for i in part:
        picture, rng = draw(10, step, i), np.random.default_rng((12, step, i))
        for y, x in rng.integers(0, (SIZE - CROP) // 4 + 1, (2, 2)) * 4:
            crops.append(picture[y : y + CROP, x : x + CROP])
    return as_tensor(np.stack(crops))


@torch.no_grad()
def normalise(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Give every latent channel mean 0 and deviation 1, by the two 1×1 convolutions around the latents.

    The pipeline knows one scale for all channels and no shift; here they can differ from channel to channel at no cost.
    """
    mean = vae.encode(pictures).latent_dist.mean
    shift, scale, n = mean.mean((0, 2, 3)), mean.std((0, 2, 3)), mean.shape[1]
    vae.quant_conv.weight[:n] /= scale[:, None, None, None]
    vae.quant_conv.bias[:n] = (vae.quant_conv.bias[:n] - shift) / scale
    vae.quant_conv.weight[n:] = 0
    vae.quant_conv.bias[n:] = -12.0  # log-variance: what is encoded for training is what an image gives
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ shift
    vae.post_quant_conv.weight *= scale[None, :, None, None]


@torch.no_grad()
def show(vae: AutoencoderKL, file: Path) -> None:
    """Measure on pictures that were not trained on; rows of pictures, what it makes of them, and that with noise."""
    images = np.stack([draw(21, i) for i in range(64)])
    latents = vae.encode(as_tensor(images)).latent_dist.mean
    noise = 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    seen, noisy = (as_pictures(vae.decode(z).sample) for z in (latents, latents + noise))
    for name, got in (("clean", seen), ("with noise 0.1", noisy)):
        error = got.astype(float) - images
        print(f"{name}: mean error {np.abs(error).mean():.2f} of 255, PSNR {20 * math.log10(255 / error.std()):.1f} dB")
    rows = [list(kind[i : i + 10]) for i in range(0, 30, 10) for kind in (images, seen, noisy)]
    sheet(rows, file)


def finish(vae: AutoencoderKL) -> None:
    """Normalise, save and show."""
    vae = vae.eval()
    normalise(vae, as_tensor(np.stack([draw(20, i) for i in range(256)])))
    vae.save_pretrained(WORK / "vae")
    show(vae, WORK / "samples" / "autoencoder.png")


def work(rank: int, total: int, save_every: float) -> None:
    """One of the training processes; the first also saves."""
    torch.manual_seed(0)
    vae = make_vae().to(memory_format=torch.channels_last)

    def loss_at(step: int) -> torch.Tensor:
        noise = torch.Generator().manual_seed(2 * step + rank)
        return loss_of(vae, batch(step, total, part_of(BATCH, rank)), noise)

    average = fit(vae, loss_at, rank, total, RATE, WORK / "autoencoder.pt", save_every)
    if rank == 0:
        finish(average)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--save-every", type=float, default=60, help="seconds between checkpoints")
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    run_workers(work, args.steps, args.save_every)


if __name__ == "__main__":
    main()
