"""The tables of an evaluation: what came out, with intervals, as Markdown and as CSV."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from klora.evaluation.metrics import Scorer
from klora.evaluation.records import Record
from klora.evaluation.statistics import LEVEL, RESAMPLES, Array, Estimate, estimates, harmonic_mean

HARMONIC, SUM = "harmonic", "sum"


@dataclass(frozen=True)
class Results:
    """Figures of each method, in the order asked for, and each one's difference from the `baseline`."""

    headings: Mapping[str, str]
    methods: tuple[str, ...]
    baseline: str
    figures: list[list[Estimate]]
    differences: list[list[Estimate]]
    seconds: tuple[float, ...]
    forwards: tuple[float, ...]
    pictures: int
    pairs: int
    left_out: Mapping[str, str]


def summarise(
    records: Sequence[Record], methods: Sequence[str], scorer: Scorer, left_out: Mapping[str, str]
) -> Results:
    """Bring the records of `methods`, all of the same pairs and seeds, together."""
    of = {name: sorted((r for r in records if r.method == name), key=_unit) for name in methods}
    values = np.array([[[r.scores[name] for name in scorer.metrics] for r in of[method]] for method in methods])
    baseline = next((name for name in methods if name.split(":")[0] == "k-lora"), methods[0])
    with_derived = _derived(list(scorer.metrics), scorer)
    place = list(methods).index(baseline)

    def against(means: Array) -> Array:
        found = with_derived(means)
        return found - found[..., place : place + 1, :]

    return Results(
        {**scorer.metrics, HARMONIC: "harmonic mean", **({SUM: "sum of CLIP scores"} if scorer.in_sum else {})},
        tuple(methods),
        baseline,
        estimates(values, with_derived),
        estimates(values, against),
        tuple(median(r.seconds for r in of[name]) for name in methods),
        tuple(median(r.forwards for r in of[name]) for name in methods),
        values.shape[1],
        len({(r.subject, r.style) for r in records}),
        left_out,
    )


def _unit(record: Record) -> tuple[str, str, int]:
    return record.subject, record.style, record.seed


def _derived(metrics: list[str], scorer: Scorer) -> Callable[[Array], Array]:
    """The metrics, then what is made of them: their harmonic mean, and their sum where it is wanted."""
    averaged, summed = ([metrics.index(name) for name in names] for names in (scorer.in_harmonic_mean, scorer.in_sum))

    def statistic(means: Array) -> Array:
        columns = [means, harmonic_mean(means[..., averaged])[..., None]]
        if summed:
            columns.append(means[..., summed].sum(axis=-1, keepdims=True))
        return np.concatenate(columns, axis=-1)

    return statistic


def markdown(results: Results, title: str, notes: Sequence[str]) -> str:
    """Write the results as people read them, in percent; `notes` say what was done."""
    heads = [*results.headings.values()]
    lines = [f"# {title}", "", *(f"- {note}" for note in notes)]
    bootstrap = f"the {LEVEL:.0%} interval of a paired bootstrap over the pictures ({RESAMPLES} draws)"
    lines.append(f"- {results.pairs} pairs, {results.pictures} pictures for each method; in brackets {bootstrap}")
    lines += ["", *heading(["method", *(f"{head} %" for head in heads), "s per image", "forwards per step"])]
    for i, name in enumerate(results.methods):
        cost = [f"{results.seconds[i]:.3g}", f"{results.forwards[i]:.3g}"]
        lines.append(row([f"`{name}`", *(cell(estimate, ".1f") for estimate in results.figures[i]), *cost]))
    others = [i for i, name in enumerate(results.methods) if name != results.baseline]
    if others:
        lines += ["", f"Difference from `{results.baseline}` on the same pairs and seeds, in percentage points:", ""]
        lines += heading(["method", *heads])
        lines += [
            row([f"`{results.methods[i]}`", *(cell(estimate, "+.1f") for estimate in results.differences[i])])
            for i in others
        ]
    if results.left_out:
        lines += ["", "Left out, because they do not run here:", ""]
        lines += [f"- `{name}`: {reason}" for name, reason in results.left_out.items()]
    return "\n".join(lines) + "\n"


def heading(cells: list[str]) -> list[str]:
    """The first two lines of a Markdown table, numbers in all columns but the first."""
    return [row(cells), row(["---", *["---:"] * (len(cells) - 1)])]


def row(cells: list[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def cell(estimate: Estimate, style: str) -> str:
    """A fraction and its interval, in percent."""
    value, low, high = (format(100 * x, style) for x in estimate)
    return f"{value} [{low}, {high}]"


def summary_lines(results: Results) -> list[tuple[str, ...]]:
    """The lines of a CSV, one for each method, scores as fractions; left-out methods have a reason only."""
    ends = ("", "_low", "_high")
    header = ("method", "pictures", *(f"{name}{end}" for name in results.headings for end in ends))
    lines = [(*header, "seconds_per_image", "forwards_per_step", "note")]
    for i, name in enumerate(results.methods):
        numbers = [f"{x:.6f}" for estimate in results.figures[i] for x in estimate]
        lines.append(
            (name, str(results.pictures), *numbers, f"{results.seconds[i]:.4f}", f"{results.forwards[i]:g}", "")
        )
    empty = [""] * (len(lines[0]) - 3)
    return lines + [(name, "0", *empty, reason) for name, reason in results.left_out.items()]


def picture_lines(records: Sequence[Record], metrics: Sequence[str]) -> list[tuple[str, ...]]:
    """The lines of a CSV, one for each picture."""
    lines = [("method", "subject", "style", "seed", *metrics, "seconds", "forwards_per_step", "picture")]
    for r in records:
        scores = [f"{r.scores[name]:.6f}" for name in metrics]
        lines.append(
            (r.method, r.subject, r.style, str(r.seed), *scores, f"{r.seconds:.4f}", f"{r.forwards:g}", r.picture)
        )
    return lines
