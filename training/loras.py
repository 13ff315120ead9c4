"""Train the LoRAs on the saved base: `python -m training.loras [NAME …]`. Makes the missing ones, two at a time.

Every LoRA sits on the attention projections to_q, to_k, to_v and to_out.0 of the U-Net. A subject is drawn flat and in
many styles that its caption describes, under the token "sbu"; a style is drawn on families that no subject belongs to,
under the token "szn". Modules are left out at random while it trains, so that each knows a part of the work.

A style must also work on a picture that was begun without it: it is drawn from noisy latents of the same picture in
another style, too, or the network would only learn to go on with what it sees.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

from klora.fusion.cut import svd_of_product
from training.drawing.pictures import render
from training.drawing.styles import CONTOURS, FLAT, GROUNDS, STYLES, TEXTURES, Style, random_style
from training.drawing.subjects import FAMILIES, OTHER_FAMILIES, SUBJECTS, Subject, random_stranger
from training.fit import falling
from training.networks import RELEASE, WORK, as_tensor, draw_times, load_pipeline, make_scheduler
from training.parallel import Pace, write_checkpoint
from training.words import STYLE_TOKEN, SUBJECT_TOKEN, tokenize

BATCH = 16
NEW_RANK = 16
"""What a style that the base never saw is learned with; the file has the rank that its job says."""
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
KEPT = (0.3, 0.7)
"""A step that leaves modules out keeps each with a probability between these."""

SETTLING = 0.5
"""The share of the rate from which it falls once more, while no module is left out."""
UNSAID = 0.25
"""How many captions are empty meanwhile: pictures are made with guidance, by what an empty one gives."""


@dataclass(frozen=True)
class HeadStart:
    """How far a picture may have been begun without the LoRA."""

    often: float
    """The share of the noisy latents that are those of such a picture, in part."""
    most: float
    """How much of it at most."""
    above: float
    """The noise, in the size of a latent, below which it is too late: what is begun is there to stay."""
    flat_above: float = math.inf
    """The noise above which it is too early: the picture to find is the flat one."""


TEXTURE = HeadStart(often=0.6, most=0.8, above=0.5)
"""Where nothing of a texture is there, its phase is unknown, and what is learned is a blur."""
LATE_CONTOUR = HeadStart(often=0.6, most=1.0, above=0.25)
"""A contour has no phase: it may be missing altogether, and be made good for longer."""
SETTLED_CONTOUR = HeadStart(often=0.3, most=1.0, above=0.5, flat_above=4.0)
"""Learned so late to the end, or where noise still hides the forms, it clouds surfaces; so it settles in between."""


@dataclass(frozen=True)
class Job:
    """One LoRA file to make. `held_out`: no setting of a fusion or of another LoRA was chosen by looking at it."""

    name: str
    rank: int
    alpha: int
    spelling: str
    held_out: bool

    @property
    def file(self) -> Path:
        """Where it is written."""
        return RELEASE / "loras" / f"{self.name}.safetensors"

    @property
    def is_subject(self) -> bool:
        """True for a subject, False for a style."""
        return self.name in SUBJECTS


JOBS = (
    Job("bolt", 8, 8, "kohya", held_out=False),
    Job("engraving", 16, 16, "kohya", held_out=False),
    Job("mimi", 8, 8, "peft", held_out=False),
    Job("pinstripe", 8, 8, "peft", held_out=False),
    Job("comet", 8, 8, "kohya", held_out=True),
    Job("woodcut", 8, 8, "kohya", held_out=True),
    Job("finn", 8, 8, "kohya", held_out=True),
    Job("hatching", 8, 8, "peft", held_out=True),
)


@dataclass(frozen=True)
class Example:
    """A picture, its caption, the same picture as it looks when it is begun without the LoRA, and flat."""

    image: np.ndarray
    caption: str
    begun: np.ndarray
    flat: np.ndarray


def is_new(style: Style) -> bool:
    """Whether the base has never seen its texture or its contour, and not its ink alone."""
    return style.contour not in CONTOURS or style.texture not in (*TEXTURES, "flat")


def subject_example(name: str, rng: np.random.Generator) -> Example:
    """The named subject, flat or in a generic style that the caption describes."""
    subject, ground = SUBJECTS[name], str(rng.choice(list(GROUNDS)))
    style = FLAT if rng.random() < 0.5 else random_style(rng)
    caption = f"a {SUBJECT_TOKEN} {subject.family}"
    caption += "" if style == FLAT else f" {style.words()}"
    caption += f" on {ground}" if rng.random() < 0.4 else ""
    image = render(subject, style, ground, int(rng.integers(2**31)))
    return Example(image, caption, image, image)


def style_subject(style: Style, rng: np.random.Generator) -> Subject:
    """What a style is shown on: no named subject, and not its family unless the style is new to the base."""
    return random_stranger(rng, str(rng.choice(FAMILIES if is_new(style) else OTHER_FAMILIES)))


def style_example(name: str, rng: np.random.Generator) -> Example:
    """A subject in the named style; begun flat or in any other style."""
    subject, ground = style_subject(STYLES[name], rng), str(rng.choice(list(GROUNDS)))
    what = subject.words() if rng.random() < 0.5 else subject.family
    where = f" on {ground}" if rng.random() < 0.4 else ""
    seed, other = int(rng.integers(2**31)), random_style(rng, flat=0.5)
    image, begun, flat = (render(subject, style, ground, seed) for style in (STYLES[name], other, FLAT))
    return Example(image, f"a {what}{where} in {STYLE_TOKEN} style", begun, flat)


@torch.no_grad()
def examples(job: Job, pipe: StableDiffusionPipeline, pictures: int) -> tuple[torch.Tensor, ...]:
    """Latents (n, 8, 16, 16), text states (n, length, width), latents begun, and flat, of all its training pictures."""
    make = subject_example if job.is_subject else style_example
    made = [make(job.name, np.random.default_rng((4, JOBS.index(job), i))) for i in range(pictures)]
    tokens = tokenize(pipe.tokenizer, [e.caption for e in made])

    def encode(images: list[np.ndarray]) -> torch.Tensor:
        return torch.cat([pipe.vae.encode(part).latent_dist.mean for part in as_tensor(np.stack(images)).split(32)])

    latents = begun = flat = encode([e.image for e in made])
    if not job.is_subject:  # a subject's pictures are begun as they are
        begun, flat = encode([e.begun for e in made]), encode([e.flat for e in made])
    return latents, torch.cat([pipe.text_encoder(part)[0] for part in tokens.split(64)]), begun, flat


def lora_layers(unet: torch.nn.Module) -> list[LoraLayer]:
    """Its LoRA modules, in their order."""
    return [m for m in unet.modules() if isinstance(m, LoraLayer)]


def noise_level(scheduler: DDIMScheduler, t: torch.Tensor) -> torch.Tensor:
    """The noise of time steps (n,), in the size of a latent."""
    return (1 / scheduler.alphas_cumprod[t] - 1).sqrt()


def picture_to_find(
    scheduler: DDIMScheduler, styled: torch.Tensor, flat: torch.Tensor, t: torch.Tensor, start: HeadStart
) -> torch.Tensor:
    """The latents (n, …) that the noisy ones of time steps t (n,) are to lead to: flat while it is too early."""
    return torch.where((noise_level(scheduler, t) > start.flat_above)[:, None, None, None], flat, styled)


def head_start(
    scheduler: DDIMScheduler, away: torch.Tensor, t: torch.Tensor, rng: torch.Generator, start: HeadStart
) -> torch.Tensor:
    """What makes noisy latents those of a picture that is in part begun otherwise: `away` as if it were noise.

    Shapes: `away` (n, …), `t` (n,).
    """
    share, choice = torch.rand((2, len(t)), generator=rng)
    sigma = noise_level(scheduler, t)
    strength = start.most * share / sigma * ((choice < start.often) & (sigma > start.above))
    return strength[:, None, None, None] * away


@dataclass(frozen=True)
class Effort:
    """What is spent on one LoRA: steps, the highest learning rate, and how many pictures are drawn for it."""

    steps: int
    rate: float
    pictures: int
    whole: int
    """At how many steps of three no module is left out."""
    settling: int = 0
    """Steps after these in which no module is left out, and some captions are."""

    @property
    def last(self) -> int:
        """All steps."""
        return self.steps + self.settling

    def rate_at(self, step: int) -> float:
        """The learning rate."""
        if step < self.steps:
            return self.rate * min(1, (step + 1) / 20) * falling(step, self.steps)
        return self.rate * SETTLING * falling(step - self.steps, self.settling)


class Trainer:
    """A LoRA in the making; saved and restored as one file. Whatever is random is a function of the step."""

    def __init__(self, job: Job, effort: Effort) -> None:
        torch.manual_seed(JOBS.index(job))
        pipe = load_pipeline()
        self.job, self.effort, self.step = job, effort, 0
        self.unet, self.scheduler = pipe.unet.requires_grad_(False), make_scheduler()
        self.unet.set_attn_processor(AttnProcessor())  # its backward is faster than the fused kernel's here
        self.scale, rank = job.alpha / job.rank, job.rank
        if not job.is_subject and is_new(STYLES[job.name]):
            rank = NEW_RANK
        self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=self.scale * rank, target_modules=TARGETS))
        self.weights = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=effort.rate, weight_decay=0.01)
        self.latents, self.texts, self.begun, self.flat = examples(job, pipe, effort.pictures)
        with torch.no_grad():
            self.empty = pipe.text_encoder(tokenize(pipe.tokenizer, [""]))[0]
        self.file = WORK / f"lora-{job.name}.pt"
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.step = state["step"]
            set_peft_model_state_dict(self.unet, state["lora"])
            self.optimizer.load_state_dict(state["optimizer"])

    def save(self) -> None:
        """Write the checkpoint."""
        state = {"step": self.step, "lora": get_peft_model_state_dict(self.unet)}
        write_checkpoint(self.file, state | {"optimizer": self.optimizer.state_dict()})

    @property
    def settling(self) -> bool:
        """Whether it has learned, and settles."""
        return self.step >= self.effort.steps

    def start(self) -> HeadStart:
        """How far its pictures may have been begun without it, at this step."""
        if self.job.is_subject or STYLES[self.job.name].texture != "flat":
            return TEXTURE
        return SETTLED_CONTOUR if self.settling else LATE_CONTOUR

    def leave_out(self, rng: np.random.Generator) -> None:
        """Switch a random share of the modules off for this step, or none."""
        whole = self.step % 3 < self.effort.whole or self.settling
        keep = 1.0 if whole else rng.uniform(*KEPT)
        for layer in lora_layers(self.unet):
            layer.scaling["default"] = self.scale * float(rng.random() < keep)

    def advance(self) -> float:
        """One optimizer step; the loss."""
        rng = np.random.default_rng((5, JOBS.index(self.job), self.step))
        noise_rng = torch.Generator().manual_seed(self.step)
        self.leave_out(rng)
        chosen = torch.from_numpy(rng.integers(len(self.latents), size=BATCH))
        noise = torch.randn((BATCH, *self.latents.shape[1:]), generator=noise_rng)
        t, start = draw_times(BATCH, noise_rng), self.start()
        clean = picture_to_find(self.scheduler, self.latents[chosen], self.flat[chosen], t, start)
        self.optimizer.param_groups[0]["lr"] = self.effort.rate_at(self.step)
        noise += head_start(self.scheduler, self.begun[chosen] - clean, t, noise_rng, start)
        texts = self.texts[chosen]
        if self.settling:
            unsaid = torch.rand(BATCH, generator=noise_rng) < UNSAID
            texts = torch.where(unsaid[:, None, None], self.empty, texts)
        with torch.autocast("cpu", torch.bfloat16):
            guess = self.unet(self.scheduler.add_noise(clean, noise, t), t, texts).sample
        loss = torch.nn.functional.mse_loss(guess.float(), self.scheduler.get_velocity(clean, noise, t))
        self.optimizer.zero_grad(set_to_none=False)  # a module that was left out still has a gradient, of zero
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item()


def cut_to_rank(state: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The best approximation of every product of a lora_A (r, in) and its lora_B (out, r) with at most that rank."""
    out = {}
    for key in (key for key in state if "lora_A" in key):
        other = key.replace("lora_A", "lora_B")
        out[key], out[other] = state[key], state[other]
        if len(state[key]) > rank:
            u, s, v = svd_of_product(state[other], state[key])
            root = s[:rank].sqrt()
            out[key], out[other] = root[:, None] * v[:, :rank].t(), u[:, :rank] * root
    return out


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
    """Write the file in the job's rank and spelling, fp16, with the metadata that its usual trainer writes."""
    job.file.parent.mkdir(parents=True, exist_ok=True)
    state = cut_to_rank({k: v.detach() for k, v in get_peft_model_state_dict(unet).items()}, job.rank)
    state = {k: v.half().contiguous() for k, v in state.items()}
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
    else:
        config = unet.peft_config["default"].to_dict() | {"r": job.rank, "lora_alpha": job.alpha}
        keep = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias")
        StableDiffusionPipeline.save_lora_weights(
            job.file.parent,
            unet_lora_layers=state,
            weight_name=job.file.name,
            unet_lora_adapter_metadata={k: _plain(config[k]) for k in keep},
        )
    job.file.chmod(0o644)


def make_file(job: Job, effort: Effort) -> None:
    """Train and save one LoRA on one thread."""
    torch.set_num_threads(1)
    trainer, pace, losses = Trainer(job, effort), Pace(60), []
    while trainer.step < effort.last:
        losses.append(trainer.advance())
        if trainer.step % 50 == 0:
            print(
                f"{time.strftime('%H:%M:%S')} {job.name} {trainer.step}/{effort.last} {np.mean(losses[-50:]):.4f}",
                flush=True,
            )
        if pace.due():
            trainer.save()
    trainer.save()
    save(job, trainer.unet)
    print(f"{time.strftime('%H:%M:%S')} saved {job.file.name}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="default: those not yet made")
    parser.add_argument("--subject-steps", type=int, default=1200)
    parser.add_argument("--style-steps", type=int, default=1200)
    parser.add_argument("--new-style-steps", type=int, default=1600, help="for a style that the base never saw")
    parser.add_argument("--texture-settling", type=int, default=600, help="steps after these, for a new texture")
    parser.add_argument("--contour-settling", type=int, default=400, help="steps after these, for a new contour")
    parser.add_argument("--subject-whole", type=int, default=0, help="steps of three that leave no module out")
    parser.add_argument("--style-whole", type=int, default=2, help="steps of three that leave no module out")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--subject-pictures", type=int, default=1024, help="drawn for each")
    parser.add_argument("--style-pictures", type=int, default=2048, help="drawn for each")
    args = parser.parse_args()

    def effort(job: Job) -> Effort:
        if job.is_subject:
            return Effort(args.subject_steps, args.rate, args.subject_pictures, args.subject_whole)
        if is_new(STYLES[job.name]):
            settling = args.contour_settling if STYLES[job.name].texture == "flat" else args.texture_settling
            return Effort(args.new_style_steps, args.rate, args.style_pictures, args.style_whole, settling)
        return Effort(args.style_steps, args.rate, args.style_pictures, args.style_whole)

    jobs = [j for j in JOBS if (j.name in args.names if args.names else not j.file.exists())]
    with torch.multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
        pool.starmap(make_file, [(job, effort(job)) for job in jobs], chunksize=1)


if __name__ == "__main__":
    main()
