"""SD.Next's own K-LoRA, its stack mode, decides by the same rule at positions counted otherwise (docs/policies.md)."""

from __future__ import annotations

import pytest

from tests.support.pairs import ATTENTION, plan_of


def style_wins(rho: float, step: int, steps: int) -> bool:
    """SD.Next's rule, S_s·γ·(1.5·t + 0.5) > S_c at t = i/(N − 1), for ρ = S_c/(γ·S_s)."""
    return 1.5 * step / (steps - 1) + 0.5 > rho


@pytest.mark.parametrize("steps", [4, 8, 20, 50])
def test_at_the_same_position_no_cell_is_decided_otherwise(steps: int) -> None:
    plan = plan_of(ATTENTION).with_steps(steps)
    differing = 0
    for name, module in plan.by_name.items():
        assert module.rho is not None
        for step in range(steps):
            theirs = style_wins(module.rho, step, steps)
            assert bool(plan.decide(name, step / (steps - 1)).style) == theirs
            differing += bool(plan.decide(name, step / steps).style) != theirs
    assert 0 < differing < 0.1 * steps * len(plan.by_name)
