"""What the other families of LoRA cost: `python -m bench.families`.

A transformer block of SDXL with 1280 channels, or for convolutions a residual block with 640, is run in turns: with one
file merged, with K-LoRA by products beside the layers, and by held weights; both also where no room is left for formed
matrices, so that each forward forms what it needs and drops it. Ratios to the merged file of the same family. Then,
for the families whose ΔW is formed, every
`--every`th linear of SDXL in a process of its own: all of their ΔW together, and what the process takes at its peak.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from bench.machine import Clock, add_busy, clock_of, describe_machine, timed, typical
from bench.memory import peak, resident
from bench.model import CONTEXT, TOKENS, merged, open_pair, write_pair
from bench.scoring import sdxl_shapes
from klora.engine import weights
from klora.engine.session import Session
from klora.engine.site import Site
from klora.pair import Pair
from klora.settings import Settings

FAMILIES = ("lora", "conv", "lokr", "loha", "dora", "full")
FORMED = ("loha", "dora", "full")
"""Families whose ΔW is formed, where the others are applied by their factors."""
GB = 1e9


class Rig(NamedTuple):
    """A block, its layers by canonical name, and one forward of it."""

    block: nn.Module
    layers: Mapping[str, nn.Linear | nn.Conv2d]
    forward: Callable[[], Tensor]


def make_rig(family: str, pixels: int, shrink: int) -> Rig:
    """A block that files of this family have deltas for, with `shrink` times fewer channels than SDXL's."""
    torch.manual_seed(0)
    if family == "conv":
        width = 640 // shrink
        path = "down_blocks.1.resnets.0"
        block: nn.Module = ResnetBlock2D(in_channels=width, out_channels=width, temb_channels=1280)
        forward = partial(block, torch.randn(2, width, pixels // 16, pixels // 16), torch.randn(2, 1280))
    else:
        width = 1280 // shrink
        path = "mid_block.attentions.0.transformer_blocks.0"
        block = BasicTransformerBlock(width, width // 64, 64, cross_attention_dim=CONTEXT)
        x, context = torch.randn(2, (pixels // 32) ** 2, width), torch.randn(2, TOKENS, CONTEXT)
        forward = partial(block, x, encoder_hidden_states=context)
    block.eval().requires_grad_(False)
    kind = nn.Conv2d if family == "conv" else nn.Linear
    layers = {f"{path}.{name}": module for name, module in block.named_modules() if isinstance(module, kind)}
    return Rig(block, layers, forward)


def write_files(family: str, shapes: Mapping[str, tuple[int, ...]], rank: int, folder: Path) -> list[Path]:
    """Two new files of a family."""
    return write_pair(folder, shapes, rank, "lora" if family == "conv" else family)


def open_session(
    pair: Pair, layers: Mapping[str, nn.Module], engine: str, block: nn.Module | None = None, room: int | None = None
) -> Session:
    """K-LoRA on all that both files have, applied by an engine, with that many bytes of room for weights.

    Weights are held in calls of the `block` that has the layers.
    """
    plan = pair.plan(Settings(scope="all", engine=engine))
    before = weights.ROOM_BYTES
    weights.ROOM_BYTES = before if room is None else room
    try:
        return Session(pair, plan, {name: Site(layer) for name, layer in layers.items()}, denoiser=block)
    finally:
        weights.ROOM_BYTES = before


@torch.no_grad()
def forwards(family: str, rank: int, pixels: int, rounds: int, clock: Clock, shrink: int = 1) -> dict[str, float]:
    """Median seconds per forward, by way."""
    rig = make_rig(family, pixels, shrink)
    with tempfile.TemporaryDirectory() as folder:
        shapes = {name: tuple(layer.weight.shape) for name, layer in rig.layers.items()}
        pair = open_pair(write_files(family, shapes, rank, Path(folder)))
        ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "no LoRA": nullcontext,
            "merged": partial(merged, rig.layers, pair.subject.loras[0]),
            "products": partial(open_session, pair, rig.layers, "bypass", rig.block),
            "held": partial(open_session, pair, rig.layers, "held", rig.block),
        }
        if family in FORMED:
            ways["products, no room"] = partial(open_session, pair, rig.layers, "bypass", rig.block, 0)
            ways["held, no room"] = partial(open_session, pair, rig.layers, "held", rig.block, 0)
        seen: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, applied in ways.items():
                with applied():
                    rig.forward()  # warms up, and forms what is kept
                    seen[way].append(timed(rig.forward, clock))
    return {way: typical(times, clock) for way, times in seen.items()}


@torch.no_grad()
def memory(files: list[Path], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """Bytes: of both files, of all ΔW of one of them together, and of this process beyond the model at its peak."""
    # One layer of each shape, which stands for all of that shape: the model itself is no concern here.
    kinds = {shape: nn.Linear(shape[1], shape[0], bias=False).requires_grad_(False) for shape in shapes.values()}
    layers = {name: nn.Linear(shape[1], shape[0], bias=False, device="meta") for name, shape in shapes.items()}
    for name, layer in layers.items():
        layer.weight = kinds[shapes[name]].weight
    pair = open_pair(files)
    alone = resident()
    with open_session(pair, layers, "bypass") as session:
        for tau in (0.0, 0.5, 1.0):
            session.set_tau(tau)
            for layer in layers.values():
                layer(torch.ones(1, layer.in_features))
    return {
        "files": float(sum(path.stat().st_size for path in files)),
        "all ΔW": 4.0 * sum(out * inner for out, inner in shapes.values()),
        "peak": float(peak() - alone),
    }


def in_a_process_of_its_own(family: str, rank: int, every: int) -> dict[str, float]:
    """`memory` of every so-manyth linear of SDXL."""
    shapes = dict(list(sdxl_shapes("linears").items())[::every])
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(memory, (write_files(family, shapes, rank, Path(folder)), shapes))


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.families", description="What other families cost.")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=512, help="side of the square picture")
    parser.add_argument("--shrink", type=int, default=1, help="times fewer channels, to try the benchmark (1)")
    parser.add_argument("--every", type=int, default=4, help="measure memory with every so-manyth linear of SDXL (4)")
    parser.add_argument("--rounds", type=int, default=9)
    add_busy(parser)
    options = parser.parse_args(argv)
    clock = clock_of(options)
    print(f"{describe_machine()}; rank {options.rank}, {options.pixels}×{options.pixels} pixels\n")
    columns = ("no LoRA", "products", "held", "products, no room", "held, no room")
    print(f"| family | one merged, ms | {' | '.join(columns)} |\n| --- | ---: |{' ---: |' * len(columns)}")
    for family in options.families:
        found = forwards(family, options.rank, options.pixels, options.rounds, clock, options.shrink)
        ratios = (f"{found[way] / found['merged']:.2f}×" if way in found else "–" for way in columns)
        print(f"| {family} | {found['merged'] * 1e3:.1f} | {' | '.join(ratios)} |", flush=True)
    print("\n| family | modules | both files, GB | all ΔW of one, GB | at the peak beside the model, GB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for family in (family for family in options.families if family in FORMED):
        bytes_ = in_a_process_of_its_own(family, options.rank, options.every)
        sizes = " | ".join(f"{value / GB:.2f}" for value in bytes_.values())
        print(f"| {family} | {len(range(0, 722, options.every))} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
