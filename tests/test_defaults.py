"""What a notebook has set as torch's default device and dtype is its own affair."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from klora.cache import ScoreCache
from klora.engine.session import Session
from klora.engine.site import Site
from klora.pair import Pair
from klora.settings import Settings
from tests.support.lora_files import write_lora

NAME = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@contextmanager
def dtype_bf16() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def another_device() -> Iterator[None]:
    # Stands for "cuda": a tensor that is made there has no values.
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("default", [dtype_bf16, another_device], ids=lambda default: default.__name__)
@pytest.mark.parametrize(
    ("family", "policy"),
    [
        *((family, "k-lora") for family in ("lora", "loha", "lokr", "dora", "full")),
        *(("lora", policy) for policy in ("lego", "ties", "knots", "dare", "np-lora", "dynamic")),
    ],
)
@torch.no_grad()
def test_plans_and_fusions_are_what_they_are_without(tmp_path: Path, default, family: str, policy: str) -> None:  # type: ignore[no-untyped-def]
    files = [write_lora(tmp_path / f"{i}.safetensors", {NAME: (24, 16)}, family=family, seed=i) for i in (1, 2)]
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 24), torch.randn(3, 16)

    def fused(cache: str) -> tuple[object, torch.Tensor]:
        pair = Pair.open(*files, ScoreCache(tmp_path / cache))
        plan = pair.plan(Settings(policy=policy))
        with Session(pair, plan, {NAME: Site(layer)}) as session:
            session.set_tau(0.5)
            return plan.selections, layer(x)

    expected = fused("one")
    with default():
        found = fused("other")
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])
