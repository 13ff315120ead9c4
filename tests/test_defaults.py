"""What a notebook has set as torch's default device and dtype is its own affair."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from klora.balance.judge import judge
from klora.cache import ScoreCache
from klora.engine.session import Session
from klora.engine.site import Site
from klora.fusion.interference import interference
from klora.merge import fused_file, merge
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


DEFAULTS = pytest.mark.parametrize("default", [dtype_bf16, another_device], ids=lambda default: default.__name__)


@DEFAULTS
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

    def fused(cache: str) -> tuple[object, Tensor]:
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


def unknown(path: Path, seed: int, rank: int = 4) -> Path:
    """A LoRA for a model that no rule names."""
    generator, key = torch.Generator().manual_seed(seed), "lora_unet_layers_0_mix"
    up, down = torch.randn(24, rank, generator=generator), torch.randn(rank, 16, generator=generator)
    save_file({f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}, path)
    return path


@DEFAULTS
def test_what_two_files_have_in_common_is_what_it_is_without(tmp_path: Path, default) -> None:  # type: ignore[no-untyped-def]
    pair = Pair.open(unknown(tmp_path / "a", 1), unknown(tmp_path / "b", 2))
    deltas = [next(iter(side.modules.values())) for side in (pair.subject, pair.style)]
    expected = interference(*deltas)
    with default():
        assert interference(*deltas) == expected


@DEFAULTS
@pytest.mark.parametrize("rank", [0, 4])
def test_a_merged_file_is_what_it_is_without(tmp_path: Path, default, rank: int) -> None:  # type: ignore[no-untyped-def]
    pair = Pair.open(unknown(tmp_path / "a", 1), unknown(tmp_path / "b", 2, rank), ScoreCache(tmp_path))
    settings = Settings(policy="direct")
    expected = load(fused_file(pair, settings, merge(pair, settings)[0], torch.float16))
    with default():
        data = fused_file(pair, settings, merge(pair, settings)[0], torch.float16)
    found = load(data)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)


@DEFAULTS
def test_pictures_are_judged_under_the_noise_that_they_are_without(default) -> None:  # type: ignore[no-untyped-def]
    class Listening:
        def __init__(self) -> None:
            self.heard: list[Tensor] = []

        def acting(self, who: str) -> object:
            def denoise(clean: Tensor, noise: Tensor, tau: float) -> Tensor:
                self.heard.append(noise)
                return clean + noise

            return nullcontext(denoise)

    before, after, pictures = Listening(), Listening(), [torch.zeros(1, 4, 8, 8)]
    judge(before, pictures, [0.5])
    with default():
        judge(after, pictures, [0.5])
    for one, other in zip(before.heard, after.heard, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
