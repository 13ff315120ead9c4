"""What an analysis shows in the accordion: the share in words, the counts, and a map that tells what is pointed at.

Every text of ours is a node of its own, so that the hosts can translate it; names, numbers and warnings are data.
"""

from __future__ import annotations

import base64
import html
import io
import json
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL import Image as Images

    from klora.fusion.plan import FusionPlan
    from klora.pair import Pair
    from klora.report.overlap import Overlap

STALE = "The pair or a setting has changed since: analyse again."
POINT = "Point at the map to see which module and step it is."
TAP = "Tap the map to see which module and step it is."
BARS = "Show it block by block"
WITHOUT_MATPLOTLIB = "The selection map needs matplotlib; install it into the WebUI's environment."
FOUND = "Found for this pair and checkpoint, share:"
DURING = "decided while sampling"
NOTHING = "nothing is contested"
SUBJECT, STEPS, MODULES, RULE, OVERLAP = "Subject", "steps", "Modules:", "Rule:", "Overlap:"
COUNTS = ("contested", "subject only", "style only", "keys not understood")
POINTED = ("step", "subject", "style", "both", "neither")
"""Words that the page itself puts together, when something is pointed at."""


class View(NamedTuple):
    """For how many steps an analysis is, whether the page is dark, and how wide the accordion is, in CSS pixels."""

    steps: int = 20
    dark: bool = False
    width: int = 1200


def page(
    title: str,
    pair: Pair,
    plan: FusionPlan,
    picture: Images.Image | None,
    overlap: Overlap,
    bars: Images.Image | None,
    found: float | None = None,
) -> str:
    """Write what a pair would do and what its files share.

    `picture` is the drawing of `selection_cells`, `bars` of `overlap_picture`; None without matplotlib. `found` is the
    share that was found for the pair the last time.
    """
    figure = _figure(plan, picture) if picture is not None else f"<p>{_say(WITHOUT_MATPLOTLIB)}</p>"
    warnings = "".join(f'<p class="klora-warning">{_data(warning)}</p>' for warning in plan.notices)
    offer = f'<p class="klora-found">{_say(FOUND)} {_data(f"{found:g}")}</p>' if found is not None else ""
    return (
        f'<div class="klora-result">{_headline(title, plan)}{offer}{_counts(pair, plan)}{warnings}'
        f'<p class="klora-stale-note">{_say(STALE)}</p>{figure}{_overlap(overlap, bars)}</div>'
    )


def rule_line(plan: FusionPlan) -> str:
    """Write the rule with its numbers."""
    from klora.report.summary import describe_rule

    return f'<p class="klora-rule">{_say(RULE)} {_data(describe_rule(plan))}</p>'


def failure(text: str) -> str:
    """Write what went wrong, on one line; who listens to the page is told at once."""
    return f'<p class="klora-error" role="alert">{_say(" ".join(text.split()))}</p>'


def told(text: str) -> str:
    """Write what went well, on one line."""
    return f'<p class="klora-told" role="status">{_say(" ".join(text.split()))}</p>'


def _headline(title: str, plan: FusionPlan) -> str:
    from klora.report.words import share_in_words

    if plan.share is None:
        share = _say(DURING if plan.contested else NOTHING)
    else:
        number, when = share_in_words(plan)
        share = f"{_say(SUBJECT)} <strong>{_data(number)}</strong>" + (f", {_say(when)}" if when else "")
    steps = f"<span>{_data(str(plan.steps))} {_say(STEPS)}</span>"
    return f'<p class="klora-headline"><span>{share}</span>{steps}<span>{_data(title)}</span></p>'


def _counts(pair: Pair, plan: FusionPlan) -> str:
    coverage = pair.coverage
    lists = (plan.contested, coverage.subject_only, coverage.style_only, coverage.unmatched)
    shown = [(len(found), name) for found, name in zip(lists, COUNTS, strict=True) if found or name == COUNTS[0]]
    counts = ", ".join(f"{_data(str(number))} {_say(name)}" for number, name in shown)
    return f'<p class="klora-counts">{_say(MODULES)} {counts}</p>'


def _overlap(overlap: Overlap, bars: Images.Image | None) -> str:
    from klora.report.overlap import meeting

    drawing = ""
    if bars is not None:
        image = f'<img src="{_source(bars)}" alt="Overlap by block">'
        drawing = f'<details class="klora-bars"><summary>{_say(BARS)}</summary>{image}</details>'
    return f'<p class="klora-overlap">{_say(OVERLAP)} {_data(meeting(overlap))}</p>{drawing}'


def _source(picture: Images.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure(plan: FusionPlan, picture: Images.Image) -> str:
    from klora.report.picture import cells_box
    from klora.report.words import module_in_words

    modules = [[module_in_words(module.name), plan.selections[module.name]] for module in plan.modules]
    told = json.dumps(
        {"box": cells_box(plan, picture.width), "steps": plan.steps, "modules": modules}, separators=(",", ":")
    )
    return (
        f'<figure class="klora-map" data-klora="{html.escape(told)}">'
        f'<img src="{_source(picture)}" alt="Selection map" draggable="false">'
        f'<figcaption data-idle="{html.escape(POINT)}" data-tap="{html.escape(TAP)}">{_say(POINT)}</figcaption>'
        "</figure>"
    )


def _say(text: str) -> str:
    return f"<span>{html.escape(text)}</span>"


def _data(text: str) -> str:
    return f'<span class="klora-data">{html.escape(text)}</span>'
