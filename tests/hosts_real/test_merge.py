"""What `klora merge` writes, loaded by the host's own LoRA code."""

from __future__ import annotations

import pytest

from klora import cli
from tests.hosts_real.server import Server


@pytest.mark.parametrize("kind", ["", "_te"], ids=["attention", "with a text encoder"])
@pytest.mark.parametrize("policy", ["direct", "np-lora", "knots", "ties"])
def test_a_merged_file_is_the_fusion_that_made_it(server: Server, policy: str, kind: str) -> None:
    folder = server.data / "models" / "Lora"
    files = [str(folder / f"{name}{kind}.safetensors") for name in ("subj", "style")]
    name = f"merged{kind}_{policy}"
    merged = folder / f"{name}.safetensors"
    assert cli.main(["merge", *files, "--policy", policy, "-o", str(merged)]) == 0
    try:
        server.call("/sdapi/v1/refresh-loras", {})
        assert (
            server.txt2img(f"<lora:{name}:1>").distance(
                server.txt2img(f"<klora:subj{kind}:style{kind}:policy={policy}>")
            )
            <= 2
        )
    finally:
        merged.unlink()
        server.call("/sdapi/v1/refresh-loras", {})
