"""The scripts of the page, each with what it needs of a page and no Gradio."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import find_chromium


@pytest.fixture(scope="module")
def seen() -> Any:
    """What a browser saw."""
    python = os.environ.get("KLORA_GRADIO4_PYTHON") or os.environ.get("KLORA_GRADIO3_PYTHON")
    if not python:
        pytest.skip("no environment with playwright is named")
    script = Path(__file__).with_name("scripts.py")
    run = subprocess.run([python, str(script), find_chromium()], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_no_script_throws_where_the_accordion_is_missing(seen: Any) -> None:
    assert seen["empty"] == []


def test_a_cell_of_a_grid_is_named_and_taken_and_another_picture_is_not(seen: Any) -> None:
    gallery = seen["gallery"]
    assert gallery["at a cell"] == "Subject share 0.7 — click: use it, Shift-click: enlarge"
    assert gallery["clicked"] == "0.7"
    assert gallery["at a picture"] is None
    assert gallery["errors"] == []


def test_a_tag_is_completed_by_clicks_alone(seen: Any) -> None:
    completion = seen["completion"]
    assert completion["offered"] == ["<klora:"]
    assert completion["completed"] == "a dog <klora:dog:ink%2B>"
    assert completion["errors"] == []


def test_names_are_not_translated(seen: Any) -> None:
    assert seen["locale"] == {"texts": ["被写体", "Subject"], "errors": []}
