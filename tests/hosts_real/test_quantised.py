"""K-LoRA's hook on Forge's own layers, one of each kind of storage."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

KINDS = (
    "fp32",
    "fp16",
    "bf16",
    "fp16 computed in fp32",
    "fp8 e4m3",
    "fp8 e5m2",
    "fp8 e4m3 scaled",
    "GGUF Q4_0",
    "GGUF Q5_0",
    "GGUF Q8_0",
    "NF4",
)


@pytest.fixture(scope="module")
def layers() -> dict[str, dict[str, object]]:
    named = os.environ.get("KLORA_FORGE_ROOT")
    if not named:
        pytest.skip("KLORA_FORGE_ROOT names no checkout")
    python = os.environ.get("KLORA_FORGE_PYTHON") or str(Path(named) / "venv" / "bin" / "python")
    script = Path(__file__).with_name("quantised_layers.py")
    done = subprocess.run(
        [python, str(script)], cwd=named, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(autouse=True)
def nothing_left() -> None:
    """No server runs for these tests."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_hook_adds_just_the_delta(layers: dict[str, dict[str, object]], kind: str) -> None:
    found = layers[kind]
    if "not_run" in found:
        pytest.skip(str(found["not_run"]))
    assert found["changed"] > 0.5  # type: ignore[operator]
    # Of the output's own resolution: what rounding once or twice costs, and nothing more.
    assert found["error"] <= 2  # type: ignore[operator]
    assert found["against_online"] <= 4  # type: ignore[operator]
    assert found["repeatable"]
    assert found["gone"]
    assert found["weight_untouched"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dora_finds_the_weight_it_depends_on(layers: dict[str, dict[str, object]], kind: str) -> None:
    found = layers[kind]
    if "not_run" in found:
        pytest.skip(str(found["not_run"]))
    if kind == "NF4":
        assert "a DoRA needs the weights it changes" in str(found["dora"])
    else:
        # The weight is seen through a product in the layer's own precision.
        assert found["dora"] <= 8  # type: ignore[operator]
