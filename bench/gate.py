"""Compare ratios with the recorded ones and print what got worse: `python -m bench.gate [--quick] [--busy] [--record]`.

Each ratio is of two times measured in turns in this run, so that it means about the same on any machine; a busy machine
still makes them worse, the less with `--busy`. Nothing fails: what is printed is for a person to look at.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from bench.machine import Clock, add_busy, clock_of, describe_machine, timed, typical
from bench.model import open_pair, write_pair
from bench.scoring import plain_scores, sdxl_shapes
from klora.cache import ScoreCache
from klora.engine.session import Session
from klora.engine.site import Site
from klora.engine.weights import KEPT
from klora.fusion.policies.base import STYLE, SUBJECT
from klora.fusion.scores import score_deltas, standard_ks
from klora.pair import PAIRS
from klora.settings import Settings

RECORDED = Path(__file__).with_name("gate.json")
TOLERANCE = 1.25
"""How many times the recorded ratio is still taken for noise."""
QUICK_STEP = 12


Ratio = Callable[[Callable[[], Any], Callable[[], Any]], float]


def ratio_of(rounds: int, clock: Clock, one: Callable[[], Any], other: Callable[[], Any]) -> float:
    """Of the times of two calls in turns, the ratio of the typical ones; the first turn warms up."""
    turns = [(timed(one, clock), timed(other, clock)) for _ in range(rounds + 1)][1:]
    return typical([first for first, _ in turns], clock) / typical([second for _, second in turns], clock)


def read_numbers(files: list[Path]) -> float:
    """Read all numbers of both files once: what everything else is compared with."""
    return sum(float(tensor.float().sum()) for file in files for tensor in load_file(file).values())


@torch.no_grad()
def measure(rank: int, step: int, ratio: Ratio, folder: Path) -> dict[str, float]:
    """All ratios, by what they say."""
    shapes = dict(list(sdxl_shapes("linears").items())[::step])
    files = write_pair(folder, shapes, rank)
    cache = ScoreCache(folder / "cache")
    subject, style = files
    pair = PAIRS.open(subject, style, cache)
    with torch.device("meta"):
        sites = {name: Site(nn.Linear(inner, out, bias=False)) for name, (out, inner) in shapes.items()}
    plan = pair.plan(Settings())
    session = Session(pair, plan, sites)

    def fuse_again() -> None:
        again = PAIRS.open(subject, style, cache)
        with Session(again, again.plan(Settings()), sites):
            pass

    def switch_twice() -> None:
        session.set_tau(0.9)
        session.set_tau(0.1)

    deltas = {name: (delta, {*standard_ks(rank), rank**2}) for name, delta in pair.subject.modules.items()}
    some = dict(list(deltas.items())[:: max(1, len(deltas) // 20)])
    name = next(name for name, shape in shapes.items() if shape == (1280, 1280))
    layer, x = nn.Linear(1280, 1280), torch.randn(2, 1024, 1280)
    with Session(pair, plan, {name: Site(layer)}):
        forward = ratio(lambda: layer(x), lambda: layer.forward(x))
    # Weights are held in calls of the model, which the layer is by itself.
    held = Session(pair, pair.plan(Settings(engine="held", policy="direct")), {name: Site(layer)}, denoiser=layer)
    lone = copy.deepcopy(layer)

    def form_twice() -> None:
        held.set_active(SUBJECT)
        held.set_active(STYLE)

    with held:
        held_forward = ratio(lambda: layer(x), lambda: lone(x))
        forming = ratio(form_twice, lambda: lone(x)) / 2
    found = {
        "a session of a known pair / reading its numbers": ratio(
            lambda: Session(pair, plan, sites), lambda: read_numbers(files)
        ),
        "the same files fused again / reading their numbers": ratio(fuse_again, lambda: read_numbers(files)),
        "scoring blockwise / plain topk": ratio(
            lambda: score_deltas(some), lambda: [plain_scores(delta, rank**2) for delta, _ in some.values()]
        ),
        "a linear layer with K-LoRA / without": forward,
        "a linear layer with a held weight / without": held_forward,
        "forming a held weight / a forward of its layer": forming,
        "a tiny layer, which costs what Python costs, with K-LoRA / without": tiny_layer(ratio, folder),
        "switching all modules / a session": ratio(switch_twice, lambda: Session(pair, plan, sites)),
    }
    KEPT.clear()
    return found


@torch.no_grad()
def tiny_layer(ratio: Ratio, folder: Path) -> float:
    """What the hook of a layer costs beside its arithmetic, where the layer has hardly any."""
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = open_pair(write_pair(folder / "tiny", {name: (64, 64)}, 4))
    layer, x = nn.Linear(64, 64), torch.randn(2, 4, 64)

    def often(function: Callable[[Any], Any]) -> None:
        for _ in range(1000):
            function(x)

    with Session(pair, pair.plan(Settings()), {name: Site(layer)}):
        return ratio(lambda: often(layer), lambda: often(layer.forward))


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description="What got worse since it was recorded.")
    parser.add_argument("--quick", action="store_true", help=f"every {QUICK_STEP}th module of SDXL only")
    parser.add_argument("--rounds", type=int, default=5)
    add_busy(parser)
    parser.add_argument("--record", action="store_true", help=f"write {RECORDED.name} instead")
    options = parser.parse_args()
    kind = "quick" if options.quick else "full"
    ratio = partial(ratio_of, options.rounds, clock_of(options))
    with tempfile.TemporaryDirectory() as folder:
        found = measure(32, QUICK_STEP if options.quick else 1, ratio, Path(folder))
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    print(f"{describe_machine()}; {kind}")
    known = recorded.get(kind, {}).get("ratios", {})
    for what, value in found.items():
        before = known.get(what)
        verdict = "" if before is None else "  worse" if value > TOLERANCE * before else "  as before"
        print(f"{value:8.3f}{'' if before is None else f' (recorded {before:.3f})'}  {what}{verdict}")
    if options.record:
        ratios = {what: round(value, 4) for what, value in found.items()}
        recorded[kind] = {"machine": describe_machine(), "ratios": ratios}
        RECORDED.write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
