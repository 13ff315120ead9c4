"""Where a fusion loses the subject: `python -m training.sweep [--seeds N]`. Prints a table of Markdown.

K-LoRA with S fuses every pair of the demo, once as it is, at other balances and shares, and with one LoRA acting
throughout in one part of the network, or in all of it for a fifth of the steps. What that changes says where, and when,
a subject is lost and a style is made.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from klora.api import fuse
from klora.commands.demo import generate
from klora.demo import catalogue
from klora.evaluation.demo_study import Recognition, demo_study
from klora.evaluation.statistics import Array, estimates
from klora.evaluation.study import StudyPair
from klora.evaluation.table import cell, heading, row
from klora.fusion.plan import FusionPlan
from klora.fusion.policies.base import STYLE, SUBJECT, Active
from training.networks import load_pipeline

PARTS = {
    "the first down block": "down_blocks.0.",
    "the second down block": "down_blocks.1.",
    "the middle": "mid_block.",
    "the first up block": "up_blocks.0.",
    "the second up block": "up_blocks.1.",
    "self-attention": ".attn1.",
    "cross-attention": ".attn2.",
}
"""Parts of the network, by what the names of their modules contain."""
FIFTHS = 5
COLUMNS = ("subject_recognised", "style_recognised", "both_recognised")


@dataclass(frozen=True)
class Forced:
    """A part of the network and of the time, τ from `start` to before `stop`, in which one LoRA acts."""

    active: Active
    part: str = ""
    start: float = 0.0
    stop: float = 1.0

    def applies(self, module: str, tau: float) -> bool:
        """Whether it decides this module at this place of sampling."""
        return self.start <= tau < self.stop and self.part in module


@dataclass(frozen=True)
class ForcedPlan(FusionPlan):
    """A plan that is overruled in a part of the network or of the time."""

    forced: Forced = field(kw_only=True)

    def decide(self, name: str, tau: float) -> Active:
        """What acts there: see `FusionPlan.decide`."""
        return self.forced.active if self.forced.applies(name, tau) else super().decide(name, tau)

    def selection(self, name: str) -> str:
        """One letter per step: see `FusionPlan.selection`."""
        return "".join(self.decide(name, i / self.steps).letter for i in range(self.steps))


@dataclass(frozen=True)
class Case:
    """One row of the table: settings, and what overrules them."""

    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    forced: Forced | None = None


def cases() -> list[Case]:
    """All rows; the first is what the others are compared with."""
    rows = [Case("S")]
    rows += [Case(f"balance {balance:g}", {"balance": balance}) for balance in (-2, -1.5, -1, -0.5, 0.5)]
    rows += [Case(f"share {share:g}", {"share": share}) for share in (0.5, 0.7)]
    for who, active in (("subject", SUBJECT), ("style", STYLE)):
        rows += [Case(f"{who} throughout in {name}", forced=Forced(active, part)) for name, part in PARTS.items()]
    for i in range(FIFTHS):
        start, stop = i / FIFTHS, (i + 1) / FIFTHS
        window = Forced(SUBJECT, start=start, stop=stop)
        rows.append(Case(f"subject alone from {start:.0%} to {stop:.0%} of the steps", forced=window))
    return rows


def overruled(plan: FusionPlan, forced: Forced) -> ForcedPlan:
    """The plan with a part of it decided otherwise."""
    return ForcedPlan(**{f.name: getattr(plan, f.name) for f in fields(plan)}, forced=forced)


def measure_pair(pair: StudyPair, seeds: Sequence[int]) -> tuple[Array, Array]:
    """One pair in every case, on one thread: (cases, seeds, `COLUMNS`) what is recognised, (cases,) subject's share."""
    torch.set_num_threads(1)
    known = catalogue.read_catalogue(catalogue.HOME)
    pipe, recognition = load_pipeline(catalogue.HOME / known["model"]), Recognition("cpu")
    found, shares = [], []
    for case in cases():
        with fuse(pipe, pair.subject.lora, pair.style.lora, scale="s", **case.settings) as session:
            if case.forced:
                session.plan = overruled(session.plan, case.forced)
            images = generate(pipe, pair.prompt, known["recommended"], seeds)
        scores = [recognition(image, pair) for image in images]
        found.append([[score[column] for column in COLUMNS] for score in scores])
        shares.append(session.plan.share)
    print(pair.name, flush=True)
    return np.array(found), np.array(shares)


def table(found: Array, shares: Array, held_out: Sequence[bool]) -> str:
    """Markdown of what was recognised (cases, pairs, seeds, 3), with shares (cases,); `held_out` is for each pair."""
    flat = found.reshape(len(found), -1, found.shape[-1])
    against = estimates(flat[:, :, 2:], lambda means: means - means[..., :1, :])
    heads = ("subject's share %", "subject %", "style %", "both %", "both, against the first", "both, held out %")
    lines = heading(["", *heads])
    for i, case in enumerate(cases()):
        means = [f"{100 * mean:.1f}" for mean in flat[i].mean(0)]
        change = cell(against[i][0], "+.1f") if i else ""
        held = found[i, np.array(held_out), :, 2].mean()
        lines.append(row([case.title, f"{100 * shares[i]:.0f}", *means, change, f"{100 * held:.0f}"]))
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each pair in each case")
    args = parser.parse_args()
    pairs = demo_study()
    with torch.multiprocessing.get_context("spawn").Pool(2) as pool:
        measured = pool.starmap(measure_pair, [(pair, range(args.seeds)) for pair in pairs], chunksize=1)
    held_out = [pair in demo_study(held_out=True) for pair in pairs]
    found = np.stack([found for found, _ in measured], axis=1)
    print(table(found, np.mean([shares for _, shares in measured], axis=0), held_out))


if __name__ == "__main__":
    main()
