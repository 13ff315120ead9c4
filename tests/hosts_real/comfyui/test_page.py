"""The page in a browser: the example workflow opens, by itself and in its picture, and its map is drawn."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.hosts_real.comfyui.server import ComfyServer


def test_the_example_opens_by_drag_and_drop_and_draws_its_map(comfyui: ComfyServer, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium on this machine")
    python = os.environ.get("KLORA_BROWSER_PYTHON")
    if not python:
        pytest.skip("KLORA_BROWSER_PYTHON names no environment with playwright")
    picture = tmp_path / "page.png"
    drive = Path(__file__).with_name("drive.py")
    run = subprocess.run(
        [python, str(drive), f"http://127.0.0.1:{comfyui.port}", chromium, str(picture)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    seen = json.loads(run.stdout)
    assert seen["k-lora.png"] == seen["k-lora.json"]
    nodes = {node["type"]: node for node in seen["k-lora.json"]}
    assert all(node["known"] for node in nodes.values())
    assert nodes["KLora"]["linked"] == ["model", "clip"]
    assert nodes["KLora"]["values"].keys() >= {"subject", "style", "balance", "policy"}
    assert nodes["KLoraMap"]["linked"] == ["plan"]
    assert picture.stat().st_size > 20_000
