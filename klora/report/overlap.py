"""How much two files are in each other's way: by block, in one sentence, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from klora.fusion.interference import Interference, total
from klora.fusion.plan import FusionPlan
from klora.fusion.scores import OnScored
from klora.lora.names import block_label, block_of
from klora.pair import Pair
from klora.text import count_of

FIGHT, SHARED = 0.1, 0.25
"""From this |cosine| on two LoRAs work with or against each other; from this inside energy on, in the same place."""
NAMED = 3
"""How many blocks a clause names."""


@dataclass(frozen=True)
class Overlap:
    """What a pair's contested modules have in common, by block in network order; `left_out` have no factors."""

    blocks: dict[str, Interference]
    left_out: int

    @property
    def whole(self) -> Interference | None:
        """All blocks as one; None where nothing was compared."""
        return total(self.blocks.values()) if self.blocks else None


def overlap_of(pair: Pair, plan: FusionPlan, on_compared: OnScored | None = None) -> Overlap:
    """Compare what both files do in every contested module, from their factors, unless that is known already.

    `on_compared` is called with how many modules are done, and of how many.
    """
    blocks: dict[str, list[Interference]] = {}
    left_out = 0
    names = (module.name for module in plan.contested)
    found = pair.cache.interferences(pair.subject, pair.style, names, on_compared)
    for name, one in found.items():
        if one is None:
            left_out += 1
        else:
            blocks.setdefault(block_of(name), []).append(one)
    return Overlap({block: total(parts) for block, parts in blocks.items()}, left_out)


def in_words(overlap: Overlap) -> str:
    """One sentence, with its numbers: where the two meet, and how much."""
    numbers = in_numbers(overlap)
    return meeting(overlap) + (f" ({numbers})" if numbers else "")


def meeting(overlap: Overlap) -> str:
    """Mostly apart, or where the two fight, reinforce each other or share their directions."""
    if overlap.whole is None:
        return "not compared: no module of both files has factors"
    kinds: dict[str, list[str]] = {}
    for block, part in overlap.blocks.items():
        kinds.setdefault(_kind(part), []).append(block_label(block))
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
    return ", ".join(clauses)


def in_numbers(overlap: Overlap) -> str:
    """The numbers of the whole; nothing where nothing was compared."""
    whole = overlap.whole
    if whole is None:
        return ""
    subject, style = whole.inside
    left = f"; {count_of(overlap.left_out, 'module')} without factors left out" if overlap.left_out else ""
    return f"cosine {whole.cosine:+.2f}, {subject:.0%} of the subject inside the style, {style:.0%} the other way{left}"


def _kind(part: Interference) -> str:
    if abs(part.cosine) >= FIGHT:
        return "with" if part.cosine > 0 else "against"
    return "same" if max(part.inside) >= SHARED else "apart"


def _listed(blocks: Sequence[str]) -> str:
    more = f" and {count_of(len(blocks) - NAMED, 'more block')}" if len(blocks) > NAMED else ""
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
