"""Train the six LoRAs on the saved base: `python -m training.loras [NAME …]`. Makes the missing ones, two at a time.

Every LoRA sits on the attention projections to_q, to_k, to_v and to_out.0 of the U-Net. A subject is drawn in many
styles under the token "sbu"; a style is drawn on families that no subject belongs to, under the token "szn".
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from training import pictures as pic
from training.common import DEMO, WORK, draw_timesteps, load_pipeline, make_scheduler, to_latents, tokenize

BATCH = 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
STYLE_FAMILIES = tuple(f for f in pic.FAMILIES if f not in {s.family for s in pic.SUBJECTS.values()})


@dataclass(frozen=True)
class Job:
    """One LoRA file to make."""

    name: str
    rank: int
    alpha: int
    spelling: str

    @property
    def file(self) -> Path:
        """Where it ships."""
        return DEMO / "loras" / f"{self.name}.safetensors"

    @property
    def is_subject(self) -> bool:
        """True for a subject, False for a style."""
        return self.name in pic.SUBJECTS


JOBS = (
    Job("bolt", 8, 8, "kohya"),
    Job("mimi", 8, 8, "kohya"),
    Job("comet", 16, 8, "kohya"),
    Job("popart", 8, 16, "peft"),
    Job("neon", 16, 16, "peft"),
    Job("parchment", 8, 8, "kohya"),
)


def subject_example(name: str, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """The named subject on a plain ground, or in a generic style that the caption describes."""
    subject = pic.SUBJECTS[name]
    style = pic.random_style(rng, subject)
    seed, caption = int(rng.integers(2**31)), f"a {pic.SUBJECT_TOKEN} {subject.family}"
    if rng.random() < 0.4:
        return pic.render(subject, pic.Style("plain", style.ground, style.ground), seed), caption
    return pic.render(subject, style, seed), f"{caption} {pic.describe_style(style)}"


def style_example(name: str, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Any subject of the training families in the named style."""
    subject = pic.random_subject(rng, str(rng.choice(STYLE_FAMILIES)))
    words = (subject.family, f"{subject.main} and {subject.second} {subject.family}", pic.describe_subject(subject))
    what = words[int(rng.choice(3, p=(0.5, 0.3, 0.2)))]
    image = pic.render(subject, pic.STYLES[name], int(rng.integers(2**31)))
    return image, f"a {what} in {pic.STYLE_TOKEN} style"


def train(job: Job, steps: int, rate: float) -> torch.nn.Module:
    """The U-Net with the trained adapter in it."""
    torch.manual_seed(JOBS.index(job))
    pipe = load_pipeline()
    unet, scheduler = pipe.unet.requires_grad_(False), make_scheduler()
    unet.set_attn_processor(AttnProcessor())  # its backward is faster than the fused kernel's here
    unet.add_adapter(LoraConfig(r=job.rank, lora_alpha=job.alpha, target_modules=TARGETS))
    weights = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    losses = []
    for step in range(steps):
        rng = np.random.default_rng((3, JOBS.index(job), step))
        make = subject_example if job.is_subject else style_example
        images, captions = zip(*(make(job.name, rng) for _ in range(BATCH)), strict=True)
        noise_rng = torch.Generator().manual_seed(step)
        clean = to_latents(np.stack(images))
        noise, t = torch.randn(clean.shape, generator=noise_rng), draw_timesteps(BATCH, noise_rng)
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                text = pipe.text_encoder(tokenize(pipe.tokenizer, list(captions)))[0]
            guess = unet(scheduler.add_noise(clean, noise, t), t, text).sample
        loss = torch.nn.functional.mse_loss(guess.float(), scheduler.get_velocity(clean, noise, t))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            print(f"{time.strftime('%H:%M:%S')} {job.name} {step + 1}/{steps} {np.mean(losses[-50:]):.4f}", flush=True)
    return unet


def kohya_state(state: dict[str, torch.Tensor], alpha: int) -> dict[str, torch.Tensor]:
    """PEFT keys of a U-Net → the keys that kohya's trainer writes."""
    out: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        module, _, factor = key.removesuffix(".weight").rpartition(".")
        name = "lora_unet_" + module.replace(".", "_")
        out[f"{name}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = tensor
        out[f"{name}.alpha"] = torch.tensor(float(alpha))
    return out


def _plain(value: object) -> object:
    """Sets are not JSON."""
    return sorted(value) if isinstance(value, set) else value


def save(job: Job, unet: torch.nn.Module) -> None:
    """Write the file in the job's spelling, fp16, with the metadata that its usual trainer writes."""
    job.file.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().half().contiguous() for k, v in get_peft_model_state_dict(unet).items()}
    if job.spelling == "kohya":
        metadata = {
            "ss_output_name": job.name,
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(job.rank),
            "ss_network_alpha": str(float(job.alpha)),
            "ss_base_model_version": "sd_v1",
            "ss_sd_model_name": "klora-demo",
        }
        save_file({k: v.half() for k, v in kohya_state(state, job.alpha).items()}, job.file, metadata=metadata)
        return
    config = unet.peft_config["default"].to_dict()
    keep = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias")
    StableDiffusionPipeline.save_lora_weights(
        job.file.parent,
        unet_lora_layers=state,
        weight_name=job.file.name,
        unet_lora_adapter_metadata={k: _plain(config[k]) for k in keep},
    )


def make_file(job: Job, steps: int, rate: float) -> None:
    """Train and save one LoRA on one thread."""
    torch.set_num_threads(1)
    save(job, train(job, steps, rate))
    job.file.chmod(0o644)
    (WORK / f"{job.name}.done").touch()
    print(f"saved {job.file.name}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="default: those not yet made")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    jobs = [j for j in JOBS if (j.name in args.names if args.names else not (WORK / f"{j.name}.done").exists())]
    with torch.multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        pool.starmap(make_file, [(job, args.steps, args.rate) for job in jobs], chunksize=1)


if __name__ == "__main__":
    main()
