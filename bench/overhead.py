"""What K-LoRA costs per UNet forward: `python -m bench.overhead`.

One transformer block of each SDXL size (640 and 1280 channels, batch 2) is run in six ways, taking turns in one
process: without a LoRA, with one LoRA merged into the weights, with one LoRA's two products and nothing else (the floor
of whatever leaves the weights alone), with K-LoRA, with the policy dynamic deciding anew in every layer, and with
everything recomputed at every forward (both ΔW formed, their K largest entries compared, the winner merged), as a
straightforward implementation does. SDXL has 10 blocks of the smaller size and 60 of the larger; "UNet" adds them up
so. Its convolutions, which carry no LoRA here, are left out: the ratios of a whole UNet are nearer to 1.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.machine import Clock, add_busy, clock_of, describe_machine, timed, typical
from bench.model import merged
from klora.cache import ScoreCache
from klora.engine.dynamic import BatchRows
from klora.engine.session import Session
from klora.engine.site import Site
from klora.lora.names import kind_of
from klora.pair import Pair
from klora.settings import Settings

# Path in SDXL, channels, heads, pixels along the side of a token, how many of this size SDXL has.
BLOCKS = (
    ("down_blocks.1.attentions.0.transformer_blocks.0", 640, 10, 16, 10),
    ("mid_block.attentions.0.transformer_blocks.0", 1280, 20, 32, 60),
)
CONTEXT = 2048
WAYS = ("no LoRA", "merged", "bare products", "K-LoRA", "dynamic", "recompute")
STEPS = 30


def make_block(channels: int, heads: int) -> nn.Module:
    """One of SDXL's transformer blocks with random weights."""
    block: nn.Module = BasicTransformerBlock(channels, heads, channels // heads, cross_attention_dim=CONTEXT)
    return block.eval()


def write_file(path: Path, linears: dict[str, nn.Linear], rank: int, seed: int) -> Path:
    """Write a kohya file of random weights for `linears`, by canonical name."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, linear in linears.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, linear.in_features, generator=generator)
        tensors[f"{key}.lora_up.weight"] = torch.randn(linear.out_features, rank, generator=generator) * 0.01
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path)
    return path


class RecomputeEverything:
    """Forward pre-hooks that choose by Eq. 1–10 anew at every forward, without a plan, and merge the winner."""

    def __init__(self, pair: Pair, linears: dict[str, nn.Linear]) -> None:
        self.pair, self.linears = pair, linears
        self.weights = {name: linear.weight.detach().clone() for name, linear in linears.items()}
        self.handles = [
            linear.register_forward_pre_hook(lambda module, args, name=name: self.merge(name))
            for name, linear in linears.items()
        ]

    def merge(self, name: str) -> None:
        """Form both deltas, compare them, write the winner into the weight."""
        subject, style = self.pair.subject.modules[name], self.pair.style.modules[name]
        c, s = subject.matrix(), style.matrix()
        k = subject.rank * style.rank
        abs_c, abs_s = c.abs().flatten(), s.abs().flatten()
        gamma = abs_c.sum() / abs_s.sum()
        wins = abs_c.topk(k).values.sum() >= abs_s.topk(k).values.sum() * gamma
        torch.add(self.weights[name], c if wins else s, out=self.linears[name].weight.data)

    def remove(self) -> None:
        """Take the hooks off and restore the weights."""
        for handle in self.handles:
            handle.remove()
        for name, weight in self.weights.items():
            self.linears[name].weight.data.copy_(weight)


def second_half(args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchRows:
    """Rows of a batch [unconditional, conditional]."""
    batch = len(args[0])
    return BatchRows(batch // 2, batch, batch)


@contextmanager
def bare(linears: dict[str, nn.Linear], pair: Pair) -> Iterator[None]:
    """The subject's LoRA by its two products and nothing else: the floor of whatever leaves the weights alone."""
    for name, linear in linears.items():
        delta = pair.subject.modules[name]
        factors = delta.factors()
        assert factors is not None
        linear.forward = partial(_bare_forward, linear, factors.down, factors.up.t(), delta.scale)  # type: ignore[method-assign]
    yield
    for linear in linears.values():
        del linear.forward


def _bare_forward(linear: nn.Linear, down: Tensor, up: Tensor, scale: float, x: Tensor) -> Tensor:
    y = F.linear(x, linear.weight, linear.bias)
    y.flatten(0, -2).addmm_(F.linear(x, down).flatten(0, -2), up, alpha=scale)
    return y


@contextmanager
def recomputed(linears: dict[str, nn.Linear], pair: Pair) -> Iterator[None]:
    """Everything decided and merged anew."""
    baseline = RecomputeEverything(pair, linears)
    yield
    baseline.remove()


@torch.no_grad()
def measure(
    rank: int, pixels: int, rounds: int, folder: Path, clock: Clock, ways: Sequence[str] = WAYS
) -> dict[str, dict[str, float]]:
    """Median seconds per forward, by block path and way."""
    results = {}
    for path, channels, heads, side, _ in BLOCKS:
        block = make_block(channels, heads)
        linears = {
            f"{path}.{name}": module
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear) and kind_of(f"{path}.{name}") == "attention"
        }
        files = [write_file(folder / f"{channels}_{rank}_{s}.safetensors", linears, rank, s) for s in (1, 2)]
        subject, style = files
        pair = Pair.open(subject, style, ScoreCache(folder / "cache"))
        sites = {name: Site(linear) for name, linear in linears.items()}
        sessions = [
            Session(pair, pair.plan(Settings(policy=policy)), sites, denoiser=block, conditional=second_half)
            for policy in ("k-lora", "dynamic")
        ]
        applied: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "no LoRA": nullcontext,
            "merged": partial(merged, linears, pair.subject.loras[0]),
            "bare products": partial(bare, linears, pair),
            "K-LoRA": lambda: sessions[0],  # noqa: B023
            "dynamic": lambda: sessions[1],  # noqa: B023
            "recompute": partial(recomputed, linears, pair),
        }
        x, context = torch.randn(2, (pixels // side) ** 2, channels), torch.randn(2, 77, CONTEXT)
        forward = partial(block, x, encoder_hidden_states=context)
        results[path] = _take_turns({way: applied[way] for way in ways}, forward, rounds, clock)
    return results


def _take_turns(
    applied: dict[str, Callable[[], AbstractContextManager[Any]]],
    forward: Callable[[], Tensor],
    rounds: int,
    clock: Clock,
) -> dict[str, float]:
    def step(held: Any, tau: float) -> Tensor:
        # Each forward is another step, so that the cost of switching is in it.
        if isinstance(held, Session):
            held.set_tau(tau)
        return forward()

    seen: dict[str, list[float]] = {way: [] for way in applied}
    for index in range(rounds + 1):
        for way, apply in applied.items():
            with apply() as held:
                seen[way].append(timed(partial(step, held, index % STEPS / STEPS), clock))
    # The first round warms up.
    return {way: typical(times[1:], clock) for way, times in seen.items()}


def whole_unet(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Seconds of all of SDXL's blocks, by way."""
    ways = next(iter(results.values()))
    return {way: sum(count * results[path][way] for path, *_, count in BLOCKS) for way in ways}


def report(rank: int, results: dict[str, dict[str, float]]) -> None:
    """Print the times and their ratios to one merged LoRA."""
    rows = {f"{channels} channels": results[path] for path, channels, *_ in BLOCKS}
    rows["UNet (10 + 60)"] = whole_unet(results)
    for label, times in rows.items():
        ratios = "  ".join(f"{way} {times[way] * 1e3:8.1f} ms {times[way] / times['merged']:5.2f}×" for way in times)
        dynamic = f"dynamic / K-LoRA {times['dynamic'] / times['K-LoRA']:.2f}×"
        print(f"rank {rank:3}  {label:15}  {ratios}  {dynamic}")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--pixels", type=int, default=512, help="side of the square picture")
    parser.add_argument("--rounds", type=int, default=15)
    add_busy(parser)
    options = parser.parse_args()
    clock = clock_of(options)
    print(describe_machine())
    picture = f"{options.pixels}×{options.pixels} pixels"
    print(f"time per forward of the transformer blocks, batch 2, {picture}, fp32; × = ratio to one merged LoRA")
    for rank in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            report(rank, measure(rank, options.pixels, options.rounds, Path(folder), clock))


if __name__ == "__main__":
    main()
