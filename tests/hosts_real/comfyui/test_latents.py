"""What is sampled, held against ComfyUI's own LoRA loader."""

from __future__ import annotations

import pytest
import torch

from tests.hosts_real.comfyui.graphs import Graph
from tests.hosts_real.comfyui.server import ComfyServer

KINDS = ("sd1", "sdxl", "flux", "qwen")


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two latents differ by rounding alone."""
    return float((found - expected).abs().max()) < 2e-3 * float(expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["subject", "style"])
def test_a_side_that_has_it_all_is_that_lora_alone(comfyui: ComfyServer, kind: str, side: str) -> None:
    pair = f"{kind}_subject.safetensors", f"{kind}_style.safetensors"
    plain, fused = Graph(kind), Graph(kind)
    expected = comfyui.latents(plain.save(plain.sample(plain.lora(plain.model(), f"{kind}_{side}.safetensors"))))
    share = 1.0 if side == "subject" else 0.0
    found = comfyui.latents(fused.save(fused.sample(fused.klora(fused.model(), *pair, share=share))))
    assert near(found, expected)
    assert not near(found, comfyui.latents(bare(kind)))


def bare(kind: str) -> Graph:
    graph = Graph(kind)
    return graph.save(graph.sample(graph.model()))
