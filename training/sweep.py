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
from klora.demo.judge import Judge
from klora.evaluation.statistics import Array, estimates
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

    forced: Forced | None = None

    def decide(self, name: str, tau: float) -> Active:
        """What acts there: see `FusionPlan.decide`."""
        if self.forced and self.forced.applies(name, tau):
            return self.forced.active
        return super().decide(name, tau)


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


def overruled(plan: FusionPlan, forced: Forced | None) -> ForcedPlan:
    """The plan with a part of it decided otherwise."""
    return ForcedPlan(**{f.name: getattr(plan, f.name) for f in fields(plan)}, forced=forced)


def measure_pair(subject: str, style: str, seeds: Sequence[int]) -> tuple[Array, Array]:
    """One pair in every case, on one thread: (cases, seeds, 3) recognised subject, style, both; (cases,) its share."""
    torch.set_num_threads(1)
    known = catalogue.read_catalogue(catalogue.HOME)
    pair = catalogue.demo_pair(known, catalogue.HOME, subject, style)
    pipe, judge = load_pipeline(catalogue.HOME / known["model"]), Judge.load()
    found, shares = [], []
    for case in cases():
        with fuse(pipe, *pair.files, scale="s", **case.settings) as session:
            session.plan = overruled(session.plan, case.forced)
            verdicts = judge(generate(pipe, pair.prompts["both"], known["recommended"], seeds))
            plan = session.plan
        rights = [(v.subject == subject, v.style == style) for v in verdicts]
        found.append([(a, b, a and b) for a, b in rights])
        shares.append(share_of(plan))
    print(f"{subject} × {style}", flush=True)
    return np.array(found, float), np.array(shares)


def share_of(plan: FusionPlan) -> float:
    """The subject's share of all choices, what is overruled counted as it acts."""
    acts = [plan.decide(m.name, i / plan.steps) == SUBJECT for m in plan.contested for i in range(plan.steps)]
    return float(np.mean(acts))


def table(found: Array, shares: Array, held_out: Sequence[bool]) -> str:
    """Markdown of what was recognised (cases, pairs, seeds, 3), with shares (cases,); `held_out` is for each pair."""
    flat = found.reshape(len(found), -1, found.shape[-1])
    against = estimates(flat[:, :, 2:], lambda means: means - means[..., :1, :])
    lines = [
        "| | subject's share % | subject % | style % | both % | both, against the first | both, held out % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for i, case in enumerate(cases()):
        a, b, both = 100 * flat[i].mean(0)
        change = "" if not i else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in against[i][0]))
        held = 100 * found[i, np.array(held_out), :, 2].mean()
        lines.append(
            f"| {case.title} | {100 * shares[i]:.0f} | {a:.1f} | {b:.1f} | {both:.1f} | {change} | {held:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each pair in each case")
    args = parser.parse_args()
    known = catalogue.read_catalogue(catalogue.HOME)
    pairs = [(a, b) for a in known["subjects"] for b in known["styles"]]
    with torch.multiprocessing.get_context("spawn").Pool(2) as pool:
        measured = pool.starmap(measure_pair, [(*pair, range(args.seeds)) for pair in pairs], chunksize=1)
    held_out = [known["subjects"][a]["held_out"] and known["styles"][b]["held_out"] for a, b in pairs]
    found = np.stack([found for found, _ in measured], axis=1)
    print(table(found, np.mean([shares for _, shares in measured], axis=0), held_out))


if __name__ == "__main__":
    main()
