"""A browser for tests of pages, driven by a script in an environment that has playwright."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest


def find_chromium() -> str:
    """The browser; the test is skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no chromium on this machine")
    return found


def drive(script: Path, port: int, *args: str, limit_s: float) -> Any:
    """What `script` saw on the page of a local server, which it prints as JSON.

    The test is skipped where there is no browser, or no environment with playwright is named.
    """
    chromium, python = find_chromium(), os.environ.get("KLORA_BROWSER_PYTHON")
    if not python:
        pytest.skip("KLORA_BROWSER_PYTHON names no environment with playwright")
    command = [python, str(script), f"http://127.0.0.1:{port}", chromium, *args]
    run = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)
