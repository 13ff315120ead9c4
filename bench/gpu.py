"""What K-LoRA costs on a GPU: `python -m bench.gpu`.

Blocks of SD 1.5, SDXL and FLUX (single and double) with random weights are run in turns: without a LoRA, with one LoRA
merged, with hooks of which none acts (what Python costs), with K-LoRA whose products are made one by one, and with
those of modules of one input joined (what is done on a GPU). Scores are computed on the CPU and on the device; sessions
are made anew and again. `--device cpu --shrink 99 --pixels 64` tries it where there is no GPU.
Prints JSON to be kept with the results, and a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from bench.machine import describe_machine, timed
from bench.model import merged, write_lora
from klora.cache import ScoreCache
from klora.engine import joined
from klora.engine.bypass import Site
from klora.engine.session import Session
from klora.engine.weights import KEPT
from klora.lora.names import kind_of
from klora.pair import Pair
from klora.settings import Settings

STEPS = 30
FLUX_TEXT = 512
FLUX_BLOCKS = {
    "flux": (FluxSingleTransformerBlock, "single_transformer_blocks"),
    "flux-double": (FluxTransformerBlock, "transformer_blocks"),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Heads(NamedTuple):
    """The attention heads of a block."""

    number: int
    width: int


HEADS = {"sd15": Heads(8, 40), "sdxl": Heads(20, 64), "flux": Heads(24, 128), "flux-double": Heads(24, 128)}


class Blocks(NamedTuple):
    """`depth` blocks of one kind in a row, and what one forward of the first takes."""

    path: str
    blocks: nn.ModuleList
    inputs: tuple[Tensor, dict[str, Any]]

    def forward(self) -> Tensor:
        """One forward of all of them."""
        x, others = self.inputs
        for block in self.blocks:
            found = block(x, **others)
            x = found[-1] if isinstance(found, tuple) else found
        return x

    def linears(self) -> dict[str, nn.Linear]:
        """The attention linears by canonical name."""
        named = ((f"{self.path}.{name}", module) for name, module in self.blocks.named_modules())
        return {
            name: module for name, module in named if isinstance(module, nn.Linear) and kind_of(name) == "attention"
        }


def make_blocks(
    model: str, depth: int, batch: int, pixels: int, device: torch.device, dtype: torch.dtype, shrink: int = 1
) -> Blocks:
    """The blocks that most of a model's time goes into: the widest of SD 1.5 or SDXL, or either kind of FLUX.

    They have `shrink` times fewer heads than the model's, at least one.
    """
    torch.manual_seed(0)
    heads = max(1, HEADS[model].number // shrink)
    make = _flux_blocks if model.startswith("flux") else _unet_blocks
    with torch.device(device):
        blocks = make(model, depth, batch, pixels, heads, heads * HEADS[model].width, dtype)
    blocks.blocks.to(dtype).eval().requires_grad_(False)
    return blocks


def _unet_blocks(model: str, depth: int, batch: int, pixels: int, heads: int, width: int, dtype: torch.dtype) -> Blocks:
    side, context = (8, 768) if model == "sd15" else (32, 2048)
    made = nn.ModuleList(
        BasicTransformerBlock(width, heads, width // heads, cross_attention_dim=context) for _ in range(depth)
    )
    # Guidance doubles the batch.
    x = torch.randn(2 * batch, (pixels // side) ** 2, width, dtype=dtype)
    others = {"encoder_hidden_states": torch.randn(2 * batch, 77, context, dtype=dtype)}
    return Blocks("mid_block.attentions.0.transformer_blocks", made, (x, others))


def _flux_blocks(model: str, depth: int, batch: int, pixels: int, heads: int, width: int, dtype: torch.dtype) -> Blocks:
    kind, path = FLUX_BLOCKS[model]
    made = nn.ModuleList(kind(width, heads, width // heads) for _ in range(depth))
    tokens = (pixels // 16) ** 2
    angles = torch.randn(tokens + FLUX_TEXT, width // heads)
    others = {
        "encoder_hidden_states": torch.randn(batch, FLUX_TEXT, width, dtype=dtype),
        "temb": torch.randn(batch, width, dtype=dtype),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    return Blocks(path, made, (torch.randn(batch, tokens, width, dtype=dtype), others))


def synchronised(device: torch.device, function: Callable[[], Any]) -> float:
    """Seconds of one call, all launched work included."""

    def finished() -> None:
        function()
        _wait(device)

    _wait(device)
    return timed(finished)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def joining(devices: set[str]) -> Iterator[None]:
    """Join products on these kinds of device alone."""
    before, joined.JOINING_DEVICES = joined.JOINING_DEVICES, devices
    try:
        yield
    finally:
        joined.JOINING_DEVICES = before


@torch.no_grad()
def measure(blocks: Blocks, pair: Pair, device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds per forward by way, and of making a session."""
    layers = blocks.linears()
    sites = {name: Site(layer) for name, layer in layers.items()}
    plan = pair.plan(Settings(), device=device)
    seen: dict[str, list[float]] = {}

    def note(way: str, function: Callable[[], Any]) -> None:
        seen.setdefault(way, []).append(synchronised(device, function))

    def fused(session: Session, step: int) -> None:
        session.set_tau(step % STEPS / STEPS)
        blocks.forward()

    for round_ in range(rounds + 1):
        KEPT.clear()
        start = time.perf_counter()
        session = Session(pair, plan, sites)
        seen.setdefault("new session", []).append(time.perf_counter() - start)
        note("no LoRA", blocks.forward)
        with merged(layers, pair.subject):
            note("merged", blocks.forward)
        start = time.perf_counter()
        session = Session(pair, plan, sites)
        seen.setdefault("session again", []).append(time.perf_counter() - start)
        for way, devices in (("one by one", set()), ("K-LoRA", {device.type})):
            with joining(devices), session:
                fused(session, round_)
                note(way, lambda: fused(session, round_ + 1))  # noqa: B023
        with session:
            for part in session._parts.values():
                part.set((0.0, 0.0))
            note("hooks alone", blocks.forward)
    return {way: statistics.median(times[1:] or times) for way, times in seen.items()}


def scoring(pair: Pair, device: torch.device, folder: Path) -> dict[str, float]:
    """Seconds of scoring the subject's file on the CPU and on the device, and the largest relative difference."""
    seconds, found = {}, []
    for where in (torch.device("cpu"), device):
        cache = ScoreCache(folder / f"scores-{where.type}-{len(found)}")
        seconds[where.type] = synchronised(device, lambda: found.append(cache.scores(pair.subject, {}, where)))  # noqa: B023
    here, there = found
    differences = [abs(there[name].l1 / score.l1 - 1) for name, score in here.items() if score.l1]
    return {**{f"scoring on {where}": value for where, value in seconds.items()}, "difference": max(differences)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="What K-LoRA costs on a GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", choices=tuple(HEADS), default=list(HEADS))
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["fp16", "bf16"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 32, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="pictures at once")
    parser.add_argument("--pixels", type=int, default=1024, help="side of the square pictures (half of it for sd15)")
    parser.add_argument("--depth", type=int, default=10, help="blocks in a row")
    parser.add_argument("--shrink", type=int, default=1, help="times fewer heads, to try the benchmark on a CPU (1)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where to keep the results")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "bench.gpu: there is no GPU here; run it where there is one, or try it with --device cpu\n")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    results: dict[str, Any] = {"machine": f"{describe_machine()}; {name}", "rows": []}
    print(results["machine"])
    print("| model | type | rank | pictures | merged, ms | no LoRA | hooks alone | one by one | K-LoRA | session, ms |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for model, dtype, rank, batch in (
        (model, dtype, rank, batch)
        for model in options.models
        for dtype in options.dtypes
        for rank in options.ranks
        for batch in options.batches
    ):
        pixels = options.pixels // 2 if model == "sd15" else options.pixels
        blocks = make_blocks(model, options.depth, batch, pixels, device, DTYPES[dtype], options.shrink)
        with tempfile.TemporaryDirectory() as folder:
            shapes = {name: tuple(layer.weight.shape) for name, layer in blocks.linears().items()}
            files = [write_lora(Path(folder) / f"{i}.safetensors", shapes, rank, i) for i in (1, 2)]
            pair = Pair.open(*files, ScoreCache(Path(folder) / "cache"))
            row = {**measure(blocks, pair, device, options.rounds), **scoring(pair, device, Path(folder))}
        results["rows"].append({"model": model, "dtype": dtype, "rank": rank, "batch": batch, **row})
        ratios = " | ".join(
            f"{row[way] / row['merged']:.3f}×" for way in ("no LoRA", "hooks alone", "one by one", "K-LoRA")
        )
        again = f"{row['session again'] * 1e3:.1f}"
        print(f"| {model} | {dtype} | {rank} | {batch} | {row['merged'] * 1e3:.2f} | {ratios} | {again} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
