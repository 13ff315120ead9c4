"""The page in a browser: the example workflow opens, by itself and in its picture, and its map is drawn."""

from __future__ import annotations

from pathlib import Path

from tests.hosts_real.comfyui.server import ComfyServer
from tests.support.browser import drive


def test_the_example_opens_by_drag_and_drop_and_draws_its_map(comfyui: ComfyServer, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    seen = drive(Path(__file__).with_name("drive.py"), comfyui.port, str(picture), limit_s=600)
    assert seen["k-lora.png"] == seen["k-lora.json"]
    nodes = {node["type"]: node for node in seen["k-lora.json"]}
    assert all(node["known"] for node in nodes.values())
    assert nodes["KLora"]["linked"] == ["model", "clip"]
    assert nodes["KLora"]["values"].keys() >= {"subject", "style", "balance", "policy"}
    assert nodes["KLoraMap"]["linked"] == ["plan"]
    assert picture.stat().st_size > 20_000
