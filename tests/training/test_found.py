"""The table of found shares: what is tried on which pictures."""

from __future__ import annotations

import numpy as np
import pytest

from klora.balance.search import SHARES
from training.found import table, tried_elsewhere


def test_a_share_is_tried_on_all_seeds_but_the_one_it_was_found_with():
    both = np.zeros((len(SHARES), 3))
    both[2] = 1
    # Found with the first seed: the good share. With the others: a bad one.
    assert tried_elsewhere(both, np.array([2, 0, 0])) == pytest.approx([0, 0.5, 0.5])


def test_every_way_has_its_row_and_the_first_is_what_others_are_compared_with():
    both = np.zeros((1, len(SHARES), 4))
    both[:, 1] = 1
    lines = table(both, np.ones((1, 4), dtype=int)).splitlines()
    assert len(lines) == 2 + 2 + len(SHARES) + 1
    assert lines[2] == "| found, on other seeds | 100.0 [100.0, 100.0] |  |"
    assert lines[4] == "| 0.4 for all | 0.0 [0.0, 0.0] | +100.0 [+100.0, +100.0] |"
