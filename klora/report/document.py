"""A plan as the JSON document of `klora analyze`, schema 1 (docs/analyze-json.md)."""

from __future__ import annotations

import math
from typing import Any

from klora.fusion.plan import FusionPlan, PlanModule
from klora.fusion.policies.base import ScaledPolicy
from klora.fusion.scale import Scale
from klora.lora.side import Side
from klora.pair import Pair, side_facts
from klora.report.overlap import Overlap, overlap_document
from klora.report.summary import ranks

SCHEMA = 1


def document(pair: Pair, plan: FusionPlan, overlap: Overlap) -> dict[str, Any]:
    """Everything that a plan decides, ready for JSON: every number is finite or null.

    `policy` is there only where the rule is not K-LoRA's own, a side's `alpha_from` where not all of it is from keys.
    """
    settings, coverage = plan.settings, pair.coverage
    policy = {} if plan.policy.name == "k-lora" else {"policy": plan.policy.name}
    scale = plan.policy.scale if isinstance(plan.policy, ScaledPolicy) else Scale("one")
    scaled = scale.kind != "one"
    return {
        "schema": SCHEMA,
        "subject": _side(pair, pair.subject),
        "style": _side(pair, pair.style),
        **policy,
        "variant": settings.variant,
        "scope": settings.scope,
        "scale": {
            "kind": scale.kind,
            "alpha": _number(scale.alpha) if scaled else None,
            "beta": _number(scale.beta) if scaled else None,
            "balance": _number(plan.balance),
        },
        "steps": plan.steps,
        "gamma": _number(plan.gamma),
        "subject_share": [_number(share) for share in plan.subject_share()],
        "share": _number(plan.share),
        "coverage": {
            "contested": len(coverage.contested),
            "subject_only": len(coverage.subject_only),
            "style_only": len(coverage.style_only),
            "text_encoder": len(coverage.text_encoder),
            "unmatched": coverage.unmatched,
        },
        "modules": [_module(module, plan) for module in plan.modules],
        "overlap": overlap_document(overlap),
    }


def _side(pair: Pair, side: Side) -> dict[str, Any]:
    facts = side_facts(side, pair.cache, path=True)
    told = all(lora.alpha_is_told for lora in side.loras)
    alphas = {} if told else {"alpha_from": [lora.alpha_from for lora in side.loras]}
    return {**facts, "modules": len(side.modules), "ranks": ranks(side.modules), **alphas}


def _module(module: PlanModule, plan: FusionPlan) -> dict[str, Any]:
    return {
        "name": module.name,
        "slice": module.slice,
        "subject_name": module.subject_name,
        "style_name": module.style_name,
        "k": module.k,
        "subject_sum": _number(module.subject_sum),
        "style_sum": _number(module.style_sum),
        "rho": _number(module.rho),
        "selection": plan.selections[module.name],
    }


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
