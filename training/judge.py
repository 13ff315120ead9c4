"""Train the judge: `python -m training.judge`, after the decoder. Resumes from its last checkpoint.

Besides right pictures it sees the ways in which a fusion fails, with a target that says "cannot tell". Every second
picture went through the autoencoder, as all that it will be shown does.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from klora.demo.judge import Judge, JudgeNet, as_batch, pack
from training.fit import falling
from training.networks import RELEASE, WORK, as_pictures, as_tensor
from training.parallel import write_checkpoint
from training.spoiled import ANY, SPOILED, STYLE_NAMES, SUBJECT_NAMES, Example, clean, spoil_a_little

BATCH = 64
RATE = 3e-3
STEPS = 6000
SEED = 2
MOST_NOISE = 0.3
"""Latents get noise of a deviation between 0 and this, for what a U-Net misses; their own is 1."""
FLOOR = 0.7
"""Below this probability the judge says nothing: the lowest, in tenths, at which it names under 2 % of spoiled ones."""
FILE = RELEASE / "judge.safetensors"


def example(rng: np.random.Generator) -> Example:
    """One training example."""
    kind = str(rng.choice(["right", *SPOILED], p=(0.5, 0.06, 0.1, 0.34)))
    if kind == "right":
        return spoil_a_little(clean(rng), rng)
    spoiled = SPOILED[kind](rng)
    return spoiled if kind == "smeared" else spoil_a_little(spoiled, rng)


def targets(labels: list[str | None], names: tuple[str, ...]) -> torch.Tensor:
    """Probabilities to aim at: one name, all alike for None, and no weight at all for `ANY`."""
    rows = torch.full((len(labels), len(names)), 1 / len(names))
    for i, label in enumerate(labels):
        if label == ANY:
            rows[i] = 0
        elif label is not None:
            rows[i] = torch.eye(len(names))[names.index(label)]
    return rows


@torch.no_grad()
def rebuilt(vae: AutoencoderKL, pictures: np.ndarray, noise: torch.Generator) -> np.ndarray:
    """What the autoencoder makes of pictures, uint8 (n, 64, 64, 3), with noise in their latents."""
    with torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(as_tensor(pictures)).latent_dist.mean.float()
        spread = MOST_NOISE * torch.rand((len(pictures), 1, 1, 1), generator=noise)
        return as_pictures(vae.decode(latents + spread * torch.randn(latents.shape, generator=noise)).sample)


def step_loss(net: JudgeNet, vae: AutoencoderKL, step: int) -> torch.Tensor:
    """Cross-entropy of both axes on the batch of this step."""
    rng = np.random.default_rng((SEED, step))
    examples = [example(rng) for _ in range(BATCH)]
    pictures = np.stack([e.image for e in examples])
    pictures[::2] = rebuilt(vae, pictures[::2], torch.Generator().manual_seed(step))
    a, b = net(as_batch(pictures))
    cross_entropy = torch.nn.functional.cross_entropy
    subject = cross_entropy(a, targets([e.subject for e in examples], SUBJECT_NAMES))
    return subject + cross_entropy(b, targets([e.style for e in examples], STYLE_NAMES))


def measure(judge: Judge, n: int = 600, seed: int = 5) -> dict[str, float]:
    """Accuracy on right pictures of a held-out seed, and how often spoiled ones get any name on the spoiled axis."""
    rng = np.random.default_rng((seed, 99))
    right = [clean(rng) for _ in range(2 * n)]
    verdicts = judge([e.image for e in right])
    figures = {
        "subject_accuracy": np.mean([v.subject == e.subject for v, e in zip(verdicts, right, strict=True)]),
        "style_accuracy": np.mean([v.style == e.style for v, e in zip(verdicts, right, strict=True)]),
    }
    for kind, make in SPOILED.items():
        spoiled = [make(rng) for _ in range(n)]
        verdicts = judge([e.image for e in spoiled])
        named = [v.subject is not None for v, e in zip(verdicts, spoiled, strict=True) if e.subject is None]
        named += [v.style is not None for v, e in zip(verdicts, spoiled, strict=True) if e.style is None]
        figures[f"{kind}_named"] = np.mean(named)
    return {name: round(float(value), 4) for name, value in figures.items()}


def save(net: JudgeNet) -> None:
    """Write what ships, in 8 bits."""
    names = {"subjects": json.dumps(SUBJECT_NAMES), "styles": json.dumps(STYLE_NAMES)}
    weights = pack({k: v for k, v in net.state_dict().items() if "num_batches" not in k})
    FILE.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, FILE, metadata={"format": "pt", "floor": str(FLOOR), **names})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    net, done, file = JudgeNet(len(SUBJECT_NAMES), len(STYLE_NAMES)), 0, WORK / "judge.pt"
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.01)
    if file.exists():
        state = torch.load(file, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    vae, losses = AutoencoderKL.from_pretrained(WORK / "vae").eval().to(memory_format=torch.channels_last), []
    for step in range(done, STEPS):
        torch.manual_seed(step)  # dropout is a function of the step too
        optimizer.param_groups[0]["lr"] = RATE * falling(step, STEPS)
        loss = step_loss(net, vae, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"{time.strftime('%H:%M:%S')} {step + 1}/{STEPS} {np.mean(losses[-100:]):.4f}", flush=True)
            write_checkpoint(file, {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    save(net)
    print(measure(Judge.load(FILE)))


if __name__ == "__main__":
    main()
