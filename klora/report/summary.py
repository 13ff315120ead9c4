"""A plan in words and figures, for a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from klora.fusion.plan import FusionPlan, PlanModule
from klora.fusion.policies.base import ScaledPolicy
from klora.fusion.scale import Scale
from klora.lora.coverage import idle
from klora.lora.deltas import Delta
from klora.lora.likeness import alike
from klora.lora.names import block_of
from klora.lora.side import WeightedLora
from klora.lora.weighted import weighted_name
from klora.pair import Pair
from klora.report.overlap import Overlap, in_words
from klora.text import count_of, one_line

WHO = {"c": "subject", "s": "style", "b": "both", "-": "neither"}
_BARS = "▁▂▃▄▅▆▇█"
_PER_ROW = 10


def summarise(pair: Pair, plan: FusionPlan, overlap: Overlap) -> str:
    """Say what the two files are, what they share, what rule decides between them, and what comes of it; in lines."""
    rows = [
        *(("subject", _describe_part(part)) for part in pair.subject.parts),
        *(("style", _describe_part(part)) for part in pair.style.parts),
        ("model", pair.architecture or "unknown architecture"),
        ("coverage", _describe_coverage(pair)),
        ("overlap", in_words(overlap)),
        ("rule", describe_rule(plan)),
        ("share", _describe_share(plan)),
    ]
    lines = [f"{label:<9} {text}" for label, text in rows]
    if not plan.undecided and {"c", "s"} & set(_letters(plan)):
        lines += ["", *_share_table(plan), "", *_block_table(plan)]
    return "\n".join(lines)


def notices(pair: Pair, plan: FusionPlan) -> list[str]:
    """What a user should be warned of, one line each."""
    found = list(plan.notices)
    if unmatched := pair.coverage.unmatched:
        found.append(f"{count_of(len(unmatched), 'key')} not understood and without effect, such as {unmatched[0]}")
    found.extend(idle(pair.loras))
    if pair.model is None and (twins := alike(pair.subject.modules, pair.style.modules)):
        found.append(
            f"{count_of(len(twins), 'module')} of the subject may be in the style too, in another spelling, such as"
            f" {twins[0][0]} and {twins[0][1]}; without the model they are not compared"
        )
    # One file may be on both sides.
    return list(dict.fromkeys(found))


def describe_rule(plan: FusionPlan) -> str:
    """Write the rule in force with its numbers, on one line."""
    parts = [plan.policy.title, f"{plan.settings.variant} variant", f"scope {plan.settings.scope}"]
    if isinstance(plan.policy, ScaledPolicy):
        gamma = "γ undefined" if plan.gamma is None else f"γ = {plan.gamma:.4g}"
        parts += [describe_scale(plan.policy.scale), gamma, f"balance {plan.balance:+.3g}"]
    return " · ".join(parts)


def describe_scale(scale: Scale) -> str:
    """A scale as its formula."""
    formula = f"{scale.alpha:g}·τ + {scale.beta:g}"
    return {"s": f"S(τ) = {formula}", "s*": f"S*(τ) = ({formula}) mod {scale.alpha:g}"}.get(scale.kind, "no scale")


def ranks(modules: Mapping[str, Delta]) -> list[int]:
    """The distinct ranks of modules, ascending."""
    return sorted({delta.rank for delta in modules.values()})


def _describe_part(part: WeightedLora) -> str:
    file = part.lora
    found = ranks(file.modules)
    rank = f", rank {'/'.join(map(str, found))}" if len(found) <= 4 else f", ranks {found[0]} to {found[-1]}"
    families = sorted({delta.family for delta in file.modules.values()})
    kind = f"{rank if found else ''} ({', '.join(families) or 'none'})"
    alpha = "" if file.alpha_is_told else f"; alpha from {file.alpha_from}"
    return (
        f"{one_line(weighted_name(file.file_name, part.weight))}: {count_of(len(file.modules), 'module')}{kind}{alpha}"
    )


def _describe_coverage(pair: Pair) -> str:
    coverage = pair.coverage
    total = len(coverage.contested) + len(coverage.subject_only) + len(coverage.style_only)
    counts = {
        "subject only": len(coverage.subject_only),
        "style only": len(coverage.style_only),
        "text encoder": len(coverage.text_encoder),
        "keys not understood": len(coverage.unmatched),
    }
    rest = ", ".join(f"{label} {count}" for label, count in counts.items())
    return f"contested {len(coverage.contested)} of {count_of(total, 'module')}; {rest}"


def absent_share(plan: FusionPlan) -> str:
    """Say why a plan has no share."""
    return "decided while sampling" if plan.contested else "nothing is contested"


def _describe_share(plan: FusionPlan) -> str:
    if not plan.contested:
        return "nothing is contested"
    if plan.undecided:
        return f"of {count_of(len(plan.contested), 'module')}: decided while sampling"
    letters = _letters(plan)
    shares = [f"{who} {letters.count(x) / len(letters):.1%}" for x, who in WHO.items() if x in letters or x in "cs"]
    beyond = len([m for m in plan.modules if m.subject_name and m.style_name]) - len(plan.contested)
    aside = f"; {count_of(beyond, 'module')} of both files outside the scope" if beyond else ""
    cells = f"{count_of(len(plan.contested), 'module')} × {count_of(plan.steps, 'step')}"
    return f"{', '.join(shares)} of {cells}{aside}"


def _letters(plan: FusionPlan) -> str:
    return "".join(plan.selections[module.name] for module in plan.contested)


def _share_table(plan: FusionPlan) -> list[str]:
    shares = [share or 0.0 for share in plan.subject_share()]
    lines = [f"subject share per step, in %   {sparkline(shares)}"]
    width = len(str(plan.steps - 1))
    for start in range(0, plan.steps, _PER_ROW):
        row = shares[start : start + _PER_ROW]
        span = f"{start:>{width}}–{start + len(row) - 1:<{width}}"
        lines.append(f"  {span}  " + " ".join(f"{100 * share:3.0f}" for share in row))
    return lines


def sparkline(shares: Sequence[float], width: int = 60) -> str:
    """Draw fractions as one line of bars, at most `width` of them."""
    count = min(len(shares), width)
    picked = [shares[i * len(shares) // count] for i in range(count)]
    return "".join(_BARS[min(int(share * len(_BARS)), len(_BARS) - 1)] for share in picked)


def _block_table(plan: FusionPlan) -> list[str]:
    label = max(len("block"), *(len(block_of(module.name)) for module in plan.contested))
    lines = [f"{'block':<{label}}  contested  subject   ρ: least  median    most   switches at steps"]
    for block, modules in _by_block(plan.contested).items():
        letters = "".join(plan.selections[module.name] for module in modules)
        share = letters.count("c") / len(letters)
        ratios = [module.rho for module in modules if module.rho is not None]
        figures = [f"{find(ratios):.3g}" if ratios else "–" for find in (min, statistics.median, max)]
        numbers = " ".join(f"{figure:>7}" for figure in figures)
        lines.append(f"{block:<{label}}  {len(modules):>9}  {share:>6.1%}    {numbers}   {_switches(plan, modules)}")
    return lines


def _by_block(modules: Iterable[PlanModule]) -> dict[str, list[PlanModule]]:
    found: dict[str, list[PlanModule]] = {}
    for module in modules:
        found.setdefault(block_of(module.name), []).append(module)
    return found


def _switches(plan: FusionPlan, modules: Iterable[PlanModule]) -> str:
    selections = [plan.selections[module.name] for module in modules]
    found = [i for letters in selections for i in range(1, len(letters)) if letters[i] != letters[i - 1]]
    if not found:
        return "never"
    switching = sum(len(set(letters)) > 1 for letters in selections)
    steps = "–".join(map(str, sorted({min(found), max(found)})))
    return f"{steps} ({switching} of {count_of(len(selections), 'module')})"
