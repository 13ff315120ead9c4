"""Measure the release: `python -m training.report`. Prints every gate, and keeps figures and gates in the catalogue.

The judge names what the base draws, and what each LoRA draws alone: in full, at strength 0.7, with a random half of
its modules, and acting in one half of the time only. Sheets of these pictures go to the work folder, to be looked at.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from klora.demo.judge import Judge
from training.drawing.pictures import SIZE
from training.drawing.styles import GROUNDS, random_style
from training.drawing.subjects import FAMILIES, OTHER_FAMILIES, SUBJECT_FAMILIES, SUBJECTS, random_subject
from training.gates import Gate, base_gates, judge_gates, lora_gates
from training.judge import FILE as JUDGE_FILE
from training.judge import measure
from training.loras import JOBS, Job, lora_layers
from training.networks import RELEASE, WORK, as_bytes, load_pipeline, sheet
from training.words import STYLE_TOKEN, SUBJECT_TOKEN

STEPS = 20
GUIDANCE = 2.5
CHUNK = 8


@dataclass(frozen=True)
class Condition:
    """How a LoRA is used: its strength, the share of its modules that act, and the steps in which they act."""

    name: str
    strength: float = 1.0
    share: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)


CONDITIONS = (
    Condition("alone"),
    Condition("strength 0.7", strength=0.7),
    Condition("half of the modules", share=0.5),
    Condition("before half", window=(0.0, 0.5)),
    Condition("after half", window=(0.5, 1.0)),
)


class Wielder:
    """A pipeline with one LoRA in it, whose modules can be switched one by one and step by step."""

    def __init__(self, pipe: StableDiffusionPipeline, lora: Path | None) -> None:
        self.pipe = pipe
        if lora:
            pipe.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name=lora.stem)
        self.layers = lora_layers(pipe.unet)
        self.full = [dict(layer.scaling) for layer in self.layers]

    def _set(self, factors: Sequence[float]) -> None:
        for layer, full, factor in zip(self.layers, self.full, factors, strict=True):
            layer.scaling = {name: value * factor for name, value in full.items()}

    def __call__(self, prompts: list[str], condition: Condition, seed: int) -> np.ndarray:
        """Pictures, uint8 (n, h, w, 3). Every chunk has another choice of modules."""
        out = []
        for start in range(0, len(prompts), CHUNK):
            rng = np.random.default_rng((6, seed, start))
            kept = rng.permutation(len(self.layers)) < condition.share * len(self.layers)
            factors = [condition.strength * float(k) for k in kept]
            out.append(self._chunk(prompts[start : start + CHUNK], condition, factors, seed + start))
        return np.concatenate(out)

    def _chunk(self, prompts: list[str], condition: Condition, factors: list[float], seed: int) -> np.ndarray:
        def enter(step: int) -> None:
            acts = condition.window[0] <= step / STEPS < condition.window[1]
            self._set(factors if acts else [0.0] * len(factors))

        def after(_pipe: object, step: int, _time: object, values: dict[str, Any]) -> dict[str, Any]:
            enter(step + 1)
            return values

        enter(0)
        noise = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        images = self.pipe(
            prompts,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=noise,
            output_type="np",
            callback_on_step_end=after,
        ).images
        return as_bytes(images)


def rounded(value: float) -> float:
    """Three digits."""
    return round(float(value), 3)


def base_figures(draws: Wielder, judge: Judge, n: int) -> dict[str, float]:
    """How often the base draws the family that a caption asks for, and flat what is asked flat, and only that."""
    rng = np.random.default_rng(7)
    subjects = [random_subject(rng, FAMILIES[i % len(FAMILIES)]) for i in range(n)]
    styles = [random_style(rng) for _ in subjects]
    grounds = [str(rng.choice(list(GROUNDS))) for _ in subjects]
    prompts = [f"a {s.words()} {t.words()} on {g}" for s, t, g in zip(subjects, styles, grounds, strict=True)]
    images = draws(prompts, Condition("base"), seed=1000)
    verdicts = judge(images)
    sheet([list(images[i : i + 8]) for i in range(0, n - 7, 8)], WORK / "samples" / "report-base.png")
    return {
        "pictures": n,
        "family": rounded(np.mean([v.subject == s.family for v, s in zip(verdicts, subjects, strict=True)])),
        "surface": rounded(
            np.mean([(v.style == "flat") == (t.texture == "flat") for v, t in zip(verdicts, styles, strict=True)])
        ),
    }


def prompts_of(job: Job, n: int) -> list[str]:
    """What a LoRA is asked: a subject, itself; a style, every second time a family that has a named subject."""
    if job.is_subject:
        return [f"a {SUBJECT_TOKEN} {SUBJECTS[job.name].family}"] * n
    families = [f for pair in zip(SUBJECT_FAMILIES, OTHER_FAMILIES, strict=False) for f in pair]
    return [f"a {families[i % len(families)]} in {STYLE_TOKEN} style" for i in range(n)]


def lora_figures(draws: Wielder, judge: Judge, job: Job, n: int) -> dict[str, float]:
    """How often it is recognised in each condition, and with what probability."""
    figures: dict[str, float] = {"pictures": n}
    rows = []
    for condition in CONDITIONS:
        images = draws(prompts_of(job, n), condition, seed=2000)
        rows.append(list(images[:12]))
        verdicts = judge(images)
        named = [(v.subject if job.is_subject else v.style) == job.name for v in verdicts]
        sure = [(v.subjects if job.is_subject else v.styles)[job.name] for v in verdicts]
        figures[condition.name] = rounded(np.mean(named))
        figures[f"{condition.name}, probability"] = rounded(np.mean(sure))
    sheet(rows, WORK / "samples" / f"report-{job.name}.png")
    return figures


def figures_of(name: str, n: int, bf16: bool) -> dict[str, float]:
    """The figures of one LoRA alone, or of the base; on one thread."""
    torch.set_num_threads(1)
    job = next((j for j in JOBS if j.name == name), None)
    draws, judge = Wielder(load_pipeline(), job.file if job else None), Judge.load(JUDGE_FILE)
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        figures = lora_figures(draws, judge, job, n) if job else base_figures(draws, judge, 2 * n)
    print(f"{time.strftime('%H:%M:%S')} {name} {figures}", flush=True)
    return figures


def entry(job: Job) -> dict[str, Any]:
    """What a user needs to know about one LoRA."""
    common = {"file": f"loras/{job.file.name}", "spelling": job.spelling, "rank": job.rank, "alpha": job.alpha}
    common |= {"held_out": job.held_out}
    if job.is_subject:
        family = SUBJECTS[job.name].family
        return common | {"token": SUBJECT_TOKEN, "family": family, "prompt": f"a {SUBJECT_TOKEN} {family}"}
    return common | {"token": STYLE_TOKEN, "prompt": f"a {{family}} in {STYLE_TOKEN} style"}


def catalogue(jobs: Sequence[Job], figures: dict[str, Any], gates: Sequence[Gate]) -> dict[str, Any]:
    """All that a program needs to know about the set."""
    return {
        "schema": 1,
        "model": "model",
        "size": SIZE,
        "recommended": {"steps": STEPS, "guidance_scale": GUIDANCE},
        "prompt": f"a {SUBJECT_TOKEN} {{family}} in {STYLE_TOKEN} style",
        "families": list(FAMILIES),
        "subjects": {job.name: entry(job) for job in jobs if job.is_subject},
        "styles": {job.name: entry(job) for job in jobs if not job.is_subject},
        "figures": figures,
        "gates": [gate.entry() for gate in gates],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="LoRAs, or base; default: all. The catalogue is written for all only")
    parser.add_argument("--pictures", type=int, default=32, help="for each figure")
    parser.add_argument("--bf16", action="store_true", help="quicker, for a first look")
    args = parser.parse_args()
    jobs = [job for job in JOBS if job.file.exists()]
    names = args.names or ["base", *(job.name for job in jobs)]
    with torch.multiprocessing.get_context("spawn").Pool(2) as pool:
        measured = pool.starmap(figures_of, [(name, args.pictures, args.bf16) for name in names], chunksize=1)
    figures = {"judge": measure(Judge.load(JUDGE_FILE)), **dict(zip(names, measured, strict=True))}
    gates = judge_gates(figures["judge"])
    gates += base_gates(figures["base"]) if "base" in figures else []
    for job in jobs:
        gates += lora_gates(job.name, job.is_subject, figures[job.name]) if job.name in figures else []
    if not args.names:
        text = json.dumps(catalogue(jobs, figures, gates), indent=2)
        (RELEASE / "catalogue.json").write_text(text + "\n", encoding="utf-8")
    print("\n".join(gate.line() for gate in gates))
    print(f"{sum(gate.passed for gate in gates)} of {len(gates)} gates pass")


if __name__ == "__main__":
    main()
