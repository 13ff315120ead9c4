"""Draw what the demo model says about the method: `python -m training.figures [--home DIR] [--out DIR]`.

`balance.png`: pairs at five balances. `premises.png`: what Fig. 2 and 3 of the paper look at, one LoRA with a random
share of its modules, and one acting in half of the time only.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from klora.api import fuse
from klora.commands.demo import generate
from klora.demo import catalogue
from klora.report.sheet import contact_sheet
from training.loras import JOBS
from training.networks import load_pipeline
from training.report import Condition, Wielder, prompts_of

BALANCES = (-2.0, -1.0, 0.0, 1.0, 2.0)
SEEDS = 3
CONDITIONS = (
    ("all modules", "", Condition("all")),
    ("3/4 of them", "chosen at random", Condition("3/4", share=0.75)),
    ("half", "chosen at random", Condition("half", share=0.5)),
    ("1/4", "chosen at random", Condition("1/4", share=0.25)),
    ("first half", "of the steps", Condition("early", window=(0.0, 0.5))),
    ("second half", "of the steps", Condition("late", window=(0.5, 1.0))),
)


def balance_strip(home: Path, pairs: int) -> Image.Image:
    """The first pairs of the catalogue by K-LoRA at each balance."""
    known = catalogue.read_catalogue(home)
    pipe = load_pipeline(home / known["model"])
    rows, groups = [], []
    for pair in catalogue.demo_pairs(known, home)[:pairs]:
        rows.append((pair.subject, f"× {pair.style}"))
        groups.append([])
        for balance in BALANCES:
            with fuse(pipe, *pair.files, balance=balance):
                groups[-1].append(generate(pipe, pair.prompts["both"], known["recommended"], range(1, SEEDS + 1)))
    sides = ("subject", "", "as in the paper", "", "style")
    titles = [f"balance {balance:+g}" if balance else "balance 0" for balance in BALANCES]
    return contact_sheet(groups, list(zip(titles, sides, strict=True)), rows)


def premises(home: Path) -> Image.Image:
    """Every LoRA alone, with parts of its modules and of the time."""
    rows, groups = [], []
    for job in JOBS:
        file = home / "loras" / job.file.name
        draws = Wielder(load_pipeline(home / "model"), file)
        prompts = prompts_of(job, SEEDS)
        groups.append([[Image.fromarray(p) for p in draws(prompts, condition, 1)] for _, _, condition in CONDITIONS])
        rows.append((job.name, "subject" if job.is_subject else "style"))
    return contact_sheet(groups, [(title, line) for title, line, _ in CONDITIONS], rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, default=catalogue.HOME, help="where model, loras and catalogue.json lie")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--pairs", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with catalogue.one_thread():
        for name, image in (("balance", balance_strip(args.home, args.pairs)), ("premises", premises(args.home))):
            image.quantize(256, dither=Image.Dither.NONE).save(args.out / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
