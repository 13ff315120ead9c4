"""The sweep overrules a plan in one part of the network or of the time, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

import klora
from klora.demo import catalogue
from klora.fusion.policies.base import STYLE, SUBJECT
from training.sweep import FIFTHS, PARTS, Forced, cases, overruled, table

STEPS = 20


@pytest.fixture(scope="module")
def plan():
    loras = catalogue.HOME / "loras"
    return klora.plan(loras / "bolt.safetensors", loras / "engraving.safetensors", scale="s", steps=STEPS)


def test_every_module_is_in_one_block_and_in_one_kind_of_attention(plan):
    for module in plan.contested:
        inside = [name for name, part in PARTS.items() if Forced(SUBJECT, part).applies(module.name, 0)]
        assert len(inside) == 2
        assert sum("attention" in name for name in inside) == 1


def test_a_part_is_overruled_at_every_step_and_the_rest_is_as_planned(plan):
    part = PARTS["the middle"]
    changed = overruled(plan, Forced(STYLE, part)).with_steps(STEPS)
    for module in plan.contested:
        for i in range(STEPS):
            planned = plan.decide(module.name, i / STEPS)
            expected = STYLE if module.name.startswith("mid_block.") else planned
            assert changed.decide(module.name, i / STEPS) == expected
    assert any(plan.decide(m.name, 0) == SUBJECT for m in plan.contested if part in m.name)


def test_the_fifths_of_the_steps_are_all_steps_once(plan):
    windows = [case.forced for case in cases() if case.forced and not case.forced.part]
    assert len(windows) == FIFTHS
    for i in range(STEPS):
        assert sum(window.applies("any", i / STEPS) for window in windows) == 1


def test_the_share_counts_what_is_overruled(plan):
    assert overruled(plan, Forced(SUBJECT, part="nowhere")).share == pytest.approx(plan.share)
    assert overruled(plan, Forced(SUBJECT)).share == 1
    assert overruled(plan, Forced(STYLE, start=0.5)).share == pytest.approx(
        sum(plan.subject_share()[: STEPS // 2]) / STEPS
    )


def test_the_table_has_a_row_for_each_case_and_compares_with_the_first():
    rows = cases()
    found = np.zeros((len(rows), 2, 4, 3))
    found[1] = 1
    found[2, 1] = 1
    lines = table(found, np.full(len(rows), 0.25), [False, True]).splitlines()
    assert len(lines) == len(rows) + 2
    assert lines[2] == "| S | 25 | 0.0 | 0.0 | 0.0 |  | 0 |"
    assert lines[3].endswith("| 100.0 | 100.0 | 100.0 | +100.0 [+100.0, +100.0] | 100 |")
    assert "| 50.0 | +50.0 [" in lines[4]
    assert lines[4].endswith("| 100 |")
