"""How much two files are in each other's way: by block, in one sentence, as JSON, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from klora.fusion.interference import Interference, interference, total
from klora.fusion.plan import FusionPlan
from klora.lora.names import block_of
from klora.pair import Pair

if TYPE_CHECKING:
    from PIL import Image as Images

FIGHT, SHARED = 0.1, 0.25
"""From this |cosine| on two LoRAs work with or against each other; from this inside energy on, in the same place."""
NAMED = 3
"""How many blocks a clause names."""
WIDTH, HEIGHT, DPI = 1200, 760, 100


@dataclass(frozen=True)
class Overlap:
    """What a pair's contested modules have in common, by block in network order; `left_out` have no factors."""

    blocks: dict[str, Interference]
    left_out: int

    @property
    def whole(self) -> Interference | None:
        """All blocks as one; None where nothing was compared."""
        return total(self.blocks.values()) if self.blocks else None


def overlap_of(pair: Pair, plan: FusionPlan) -> Overlap:
    """Compare what both files do in every contested module, from their factors."""
    found: dict[str, list[Interference]] = {}
    left_out = 0
    for module in plan.contested:
        one = interference(pair.subject.modules[module.name], pair.style.modules[module.name])
        if one is None:
            left_out += 1
        else:
            found.setdefault(block_of(module.name), []).append(one)
    return Overlap({block: total(parts) for block, parts in found.items()}, left_out)


def in_words(overlap: Overlap) -> str:
    """One sentence: mostly apart, or where the two fight, reinforce each other or share their directions."""
    whole = overlap.whole
    if whole is None:
        return "not compared: no module of both files has factors"
    kinds: dict[str, list[str]] = {}
    for block, part in overlap.blocks.items():
        kinds.setdefault(_kind(part), []).append(block)
    clauses = [
        f"{verb} in {_listed(kinds[kind])}"
        for kind, verb in (
            ("against", "fight"),
            ("with", "reinforce each other"),
            ("same", "use the same directions"),
        )
        if kind in kinds
    ]
    if not clauses:
        clauses = ["mostly apart"]
    elif "apart" in kinds:
        clauses.append("elsewhere apart")
    subject, style = whole.inside
    left = f"; {overlap.left_out} modules without factors left out" if overlap.left_out else ""
    numbers = f"cosine {whole.cosine:+.2f}, {subject:.0%} of the subject inside the style, {style:.0%} the other way"
    return f"{', '.join(clauses)} ({numbers}{left})"


def _kind(part: Interference) -> str:
    if abs(part.cosine) >= FIGHT:
        return "with" if part.cosine > 0 else "against"
    return "same" if max(part.inside) >= SHARED else "apart"


def _listed(blocks: Sequence[str]) -> str:
    more = f" and {len(blocks) - NAMED} more blocks" if len(blocks) > NAMED else ""
    return ", ".join(blocks[:NAMED]) + more


def overlap_document(overlap: Overlap) -> dict[str, Any]:
    """The same ready for JSON (docs/analyze-json.md)."""
    whole = overlap.whole
    return {
        "sentence": in_words(overlap),
        "compared": whole.modules if whole else 0,
        "left_out": overlap.left_out,
        **(_numbers(whole) if whole else dict.fromkeys(_KEYS)),
        "blocks": [
            {"block": block, "modules": part.modules, **_numbers(part)} for block, part in overlap.blocks.items()
        ],
    }


_KEYS = ("cosine", "output_overlap", "input_overlap", "subject_inside", "style_inside")


def _numbers(part: Interference) -> dict[str, float]:
    return dict(zip(_KEYS, (part.cosine, *part.overlaps, *part.inside), strict=True))


def overlap_picture(overlap: Overlap, title: str) -> Images.Image:
    """Draw, for each block, the cosine above and what is shared below. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    from klora.report.picture import COLOURS

    figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    parts = list(overlap.blocks.values())
    places = np.arange(len(parts))
    # A "$" in a file name would begin a formula.
    figure.suptitle(f"{title}: {in_words(overlap)}".replace("$", r"\$"), fontsize=13, wrap=True)
    above.bar(places, [part.cosine for part in parts], width=0.6, color="#6B7280")
    above.axhline(0, color="#222222", linewidth=1)
    above.set(ylim=(-1, 1))
    above.set_ylabel("cosine of both ΔW", fontsize=12)
    sides = (("subject inside style", "c"), ("style inside subject", "s"))
    for side, (label, letter) in enumerate(sides):
        heights = [part.inside[side] for part in parts]
        below.bar(places + 0.4 * side - 0.2, heights, width=0.38, color=COLOURS[letter], label=label)
    for side, (label, marker) in enumerate((("output spaces shared", "^"), ("input spaces shared", "v"))):
        heights = [part.overlaps[side] for part in parts]
        below.plot(places, heights, marker, color="#222222", markersize=7, label=label)
    below.set(ylim=(0, 1))
    below.set_ylabel("fraction of energy, of space", fontsize=12)
    below.set_xticks(places, list(overlap.blocks), rotation=30, ha="right", fontsize=11)
    below.legend(ncols=4, frameon=False, fontsize=11, loc="upper center")
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
