"""Measure what ships and write `klora/demo/catalogue.json`: `python -m training.report`.

The base, each subject alone and each style alone generate pictures that the judge names. Sample sheets go to the work
folder.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from klora.demo.judge import Judge
from training import pictures as pic
from training.common import DEMO, WORK, generate, load_pipeline, sheet
from training.judge import measure
from training.loras import JOBS, STYLE_FAMILIES, Job

STEPS = 20
GUIDANCE = 2.5
SUBJECT_FAMILIES = tuple(s.family for s in pic.SUBJECTS.values())


def base_figures(pipe: StableDiffusionPipeline, judge: Judge, n: int) -> dict[str, float]:
    """How often the base generates the family and the pattern that a full caption asks for."""
    rng = np.random.default_rng(7)
    subjects = [pic.random_subject(rng, pic.FAMILIES[i % len(pic.FAMILIES)]) for i in range(n)]
    styles = [pic.random_style(rng, s) for s in subjects]
    prompts = [f"a {pic.describe_subject(s)} {pic.describe_style(t)}" for s, t in zip(subjects, styles, strict=True)]
    images = generate(pipe, prompts, seed=1000, steps=STEPS, cfg=GUIDANCE)
    verdicts = judge(images)
    sheet([list(images[i : i + 8]) for i in range(0, n - 7, 8)], WORK / "samples" / "report-base.png")
    return {
        "pictures": n,
        "family": share([v.subject == s.family for v, s in zip(verdicts, subjects, strict=True)]),
        "pattern": share([v.style == s.pattern for v, s in zip(verdicts, styles, strict=True)]),
    }


def share(hits: list[bool]) -> float:
    """Fraction of hits."""
    return round(float(np.mean(hits)), 3)


def subject_figures(pipe: StableDiffusionPipeline, judge: Judge, name: str, n: int) -> dict[str, float]:
    """How often a subject LoRA alone generates its subject, on its own prompt."""
    prompt = f"a {pic.SUBJECT_TOKEN} {pic.SUBJECTS[name].family}"
    images = generate(pipe, [prompt] * n, seed=2000, steps=STEPS, cfg=GUIDANCE)
    sheet([list(images[i : i + 8]) for i in range(0, n - 7, 8)], WORK / "samples" / f"report-{name}.png")
    verdicts = judge(images)
    return {"pictures": n, "subject": share([v.subject == name for v in verdicts])}


def style_figures(pipe: StableDiffusionPipeline, judge: Judge, name: str, n: int) -> dict[str, float]:
    """How often a style LoRA alone generates its style: on the families it was trained on, and on the others."""
    out: dict[str, float] = {"pictures": n}
    rows = []
    for key, families in (("style", STYLE_FAMILIES), ("style_on_new_families", SUBJECT_FAMILIES)):
        asked = [families[i % len(families)] for i in range(n // 2)]
        prompts = [f"a {family} in {pic.STYLE_TOKEN} style" for family in asked]
        images = generate(pipe, prompts, seed=3000, steps=STEPS, cfg=GUIDANCE)
        verdicts = judge(images)
        rows += [list(images[i : i + 8]) for i in range(0, n // 2 - 7, 8)]
        out[key] = share([v.style == name for v in verdicts])
        out[key.replace("style", "family", 1)] = share([v.subject == f for v, f in zip(verdicts, asked, strict=True)])
    sheet(rows, WORK / "samples" / f"report-{name}.png")
    return out


def entry(job: Job) -> dict[str, object]:
    """What a user needs to know about one LoRA."""
    common = {"file": f"loras/{job.file.name}", "spelling": job.spelling, "rank": job.rank, "alpha": job.alpha}
    if job.is_subject:
        family = pic.SUBJECTS[job.name].family
        return common | {"token": pic.SUBJECT_TOKEN, "family": family, "prompt": f"a {pic.SUBJECT_TOKEN} {family}"}
    return common | {"token": pic.STYLE_TOKEN, "prompt": f"a {{family}} in {pic.STYLE_TOKEN} style"}


def figures_of(name: str, n: int) -> dict[str, float]:
    """The figures of one LoRA alone, or of the base; on one thread."""
    torch.set_num_threads(1)
    pipe, judge = load_pipeline(), Judge.load()
    if name == "base":
        return base_figures(pipe, judge, n)
    pipe.load_lora_weights(DEMO / "loras", weight_name=f"{name}.safetensors", adapter_name=name)
    figures = (subject_figures if name in pic.SUBJECTS else style_figures)(pipe, judge, name, n)
    print(f"{time.strftime('%H:%M:%S')} {name} {figures}", flush=True)
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=64, help="for each figure")
    args = parser.parse_args()
    names = ["base", *(job.name for job in JOBS)]
    with torch.multiprocessing.get_context("spawn").Pool(2) as pool:
        measured = pool.starmap(figures_of, [(name, args.pictures) for name in names], chunksize=1)
    figures = {"judge": measure(Judge.load()), **dict(zip(names, measured, strict=True))}
    catalogue = {
        "schema": 1,
        "model": "model",
        "size": pic.SIZE,
        "recommended": {"steps": STEPS, "guidance_scale": GUIDANCE},
        "prompt": f"a {pic.SUBJECT_TOKEN} {{family}} in {pic.STYLE_TOKEN} style",
        "families": list(pic.FAMILIES),
        "subjects": {job.name: entry(job) for job in JOBS if job.is_subject},
        "styles": {job.name: entry(job) for job in JOBS if not job.is_subject},
        "figures": figures,
    }
    (DEMO / "catalogue.json").write_text(json.dumps(catalogue, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
