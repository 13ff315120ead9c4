"""What K-LoRA costs per UNet forward: `python -m bench.overhead`.

One transformer block of each SDXL size (640 and 1280 channels, batch 2) is run in five ways, taking turns in one
process: without a LoRA, with one LoRA merged into the weights, with K-LoRA, with the policy dynamic deciding anew in
every layer, and with everything recomputed at every forward (both ΔW formed, their K largest entries compared, the
winner merged), as a straightforward implementation does. SDXL has 10 blocks of the smaller size and 60 of the larger;
"UNet" adds them up so. Its convolutions, which carry no LoRA here, are left out: the ratios of a whole UNet are nearer
to 1.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.machine import describe_machine
from klora.cache import ScoreCache
from klora.engine.bypass import Site
from klora.engine.dynamic import Rows
from klora.engine.session import Session
from klora.lora.names import kind_of
from klora.pair import Pair
from klora.settings import Settings

# Path in SDXL, channels, heads, pixels along the side of a token, how many of this size SDXL has.
BLOCKS = (
    ("down_blocks.1.attentions.0.transformer_blocks.0", 640, 10, 16, 10),
    ("mid_block.attentions.0.transformer_blocks.0", 1280, 20, 32, 60),
)
CONTEXT = 2048
STEPS = 30


def make_block(channels: int, heads: int) -> nn.Module:
    """One of SDXL's transformer blocks with random weights."""
    return BasicTransformerBlock(channels, heads, channels // heads, cross_attention_dim=CONTEXT).eval()


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


def second_half(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
    """Rows of a batch [unconditional, conditional]."""
    batch = len(args[0])
    return Rows(batch // 2, batch, batch)


def timed(forward: Callable[[], Tensor]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    forward()
    return time.perf_counter() - start


@torch.no_grad()
def measure(rank: int, pixels: int, rounds: int, folder: Path) -> dict[str, dict[str, float]]:
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
        pair = Pair.open(*files, ScoreCache(folder / "cache"))
        sites = {name: Site(linear) for name, linear in linears.items()}
        sessions = {
            way: Session(pair, pair.plan(Settings(policy=policy)), sites, denoiser=block, conditional=second_half)
            for way, policy in (("K-LoRA", "k-lora"), ("dynamic", "dynamic"))
        }
        x, context = torch.randn(2, (pixels // side) ** 2, channels), torch.randn(2, 77, CONTEXT)
        results[path] = _take_turns(block, sessions, pair, linears, x, context, rounds)
    return results


def _take_turns(
    block: nn.Module,
    sessions: dict[str, Session],
    pair: Pair,
    linears: dict[str, nn.Linear],
    x: Tensor,
    context: Tensor,
    rounds: int,
) -> dict[str, float]:
    seen: dict[str, list[float]] = {"no LoRA": [], "merged": [], "K-LoRA": [], "dynamic": [], "recompute": []}

    def forward() -> Tensor:
        return block(x, encoder_hidden_states=context)

    for index in range(rounds + 1):
        plain = timed(forward)
        originals = {name: linear.weight.detach().clone() for name, linear in linears.items()}
        for name, linear in linears.items():
            linear.weight += pair.subject.modules[name].matrix()
        merged = timed(forward)
        for name, linear in linears.items():
            linear.weight.copy_(originals[name])
        fused = []
        for session in sessions.values():
            with session:
                # Each forward is another step, so that the cost of switching is in it.
                fused.append(timed(lambda: (session.set_tau(index % STEPS / STEPS), forward())[1]))  # noqa: B023
        baseline = RecomputeEverything(pair, linears)
        recomputed = timed(forward)
        baseline.remove()
        if index:  # the first round warms up
            for name, value in zip(seen, (plain, merged, *fused, recomputed), strict=True):
                seen[name].append(value)
    return {name: statistics.median(values) for name, values in seen.items()}


def report(rank: int, results: dict[str, dict[str, float]]) -> None:
    """Print the times and their ratios to one merged LoRA."""
    rows = {f"{channels} channels": results[path] for path, channels, *_ in BLOCKS}
    rows["UNet (10 + 60)"] = {
        way: sum(count * results[path][way] for path, *_, count in BLOCKS) for way in next(iter(results.values()))
    }
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
    options = parser.parse_args()
    print(describe_machine())
    picture = f"{options.pixels}×{options.pixels} pixels"
    print(f"time per forward of the transformer blocks, batch 2, {picture}, fp32; × = ratio to one merged LoRA")
    for rank in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            report(rank, measure(rank, options.pixels, options.rounds, Path(folder)))


if __name__ == "__main__":
    main()
