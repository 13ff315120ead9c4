"""The scripts of the page, each with what it needs of a page and no Gradio."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from klora.webui.balance_grid import BalanceGrid, _plot
from klora.webui.ui import Accordion
from tests.support.browser import find_chromium
from tests.webui.recorded_gradio import Component, RecordedGradio


@pytest.fixture(scope="module")
def seen() -> Any:
    """What a browser saw."""
    python = os.environ.get("KLORA_GRADIO4_PYTHON") or os.environ.get("KLORA_GRADIO3_PYTHON")
    if not python:
        pytest.skip("no environment with playwright is named")
    command = [python, str(Path(__file__).with_name("scripts.py")), find_chromium(), filling()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def filling() -> str:
    """What the page answers the button of the grid of balances with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gradio", RecordedGradio())
        found = Accordion({"enabled": Component("Checkbox")}, compare=Component("Button"))
        grid = BalanceGrid("txt2img", found)
        for elem_id in _plot("txt2img"):
            grid.see(Component("Any"), elem_id)
    return str(found.compare.events["click"][0]["js"])


def test_no_script_throws_where_the_accordion_is_missing(seen: Any) -> None:
    assert seen["empty"] == []


def test_a_cell_of_a_grid_is_named_and_taken_and_another_picture_is_not(seen: Any) -> None:
    gallery = seen["gallery"]
    assert gallery["at a cell"] == "Subject share 0.7 — click: use it, Shift-click: enlarge"
    assert gallery["clicked"] == "0.7"
    assert gallery["at a picture"] is None
    assert gallery["errors"] == []


def test_comparing_balances_enables_the_accordion_unless_a_typed_tag_counts(seen: Any) -> None:
    compared = seen["compared"]
    assert compared["from the accordion"] == [True, True]
    assert compared["by a tag"] == [False, True]


def test_a_tag_is_completed_by_clicks_alone(seen: Any) -> None:
    completion = seen["completion"]
    assert completion["offered"] == ["<klora:"]
    assert completion["completed"] == "a dog <klora:dog:ink%2B>"
    assert completion["errors"] == []


def test_names_are_not_translated(seen: Any) -> None:
    assert seen["locale"] == {"texts": ["被写体", "Subject"], "errors": []}
