"""What whole pictures cost, first and again: `python -m bench.picture`.

On a diffusers pipeline of SDXL's real widths with random weights, in turns in one run: no LoRA, one and two ordinary
LoRAs (their files opened, merged and taken out again, as hosts do it), and K-LoRA: the first picture with two new
files, the second, and again after a picture with another pair. Of K-LoRA's pictures also the parts. With `--webui URL`
the same on a running WebUI (started with --api), whose LoRAs are named by `--loras`.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import klora
from bench.machine import describe_machine, timed, wait_for
from bench.model import linears_of, make_pipeline, merged, module_shapes, picture, write_lora
from klora.cache import ScoreCache
from klora.engine.session import Session
from klora.engine.weights import Weights
from klora.hosts.diffusers import DiffusersHost
from klora.lora.file import LoraFile
from klora.pair import Pair

WAYS = ("no LoRA", "one LoRA", "two LoRAs", "K-LoRA, first", "K-LoRA, second", "K-LoRA, after another pair")


class Parts:
    """Seconds spent in the parts of a fusion, each without those inside it."""

    PLACES = (
        ("open", LoraFile, "__init__"),
        ("score", ScoreCache, "scores"),
        ("plan", Pair, "plan"),
        ("sites", DiffusersHost, "sites"),
        ("bind", Session, "__init__"),
        ("transfer", Weights, "__init__"),
        ("transfer", Weights, "chain"),
        ("attach", Session, "attach"),
        ("switch", Session, "set_active"),
        ("detach", Session, "detach"),
    )

    def __init__(self) -> None:
        self.seconds = {name: 0.0 for name, _, _ in self.PLACES} | {"forwards": 0.0}
        self._inside: list[float] = []

    @contextmanager
    def watched(self, pipe: Any) -> Iterator[None]:
        """Watch all parts inside the block."""
        with ExitStack() as stack:
            for name, owner, method in (*self.PLACES, ("forwards", type(pipe.unet), "forward")):
                timed = self._timed(name, getattr(owner, method), pipe.unet.device)
                stack.enter_context(mock.patch.object(owner, method, timed))
            yield

    def _timed(self, name: str, function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            wait_for(device)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                wait_for(device)
                whole = time.perf_counter() - start
                self.seconds[name] += whole - self._inside.pop()
                if self._inside:
                    self._inside[-1] += whole

        return wrapper


def with_merged(pipe: Any, files: list[Path], make: Callable[[], Any]) -> None:
    """A picture with ordinary LoRAs: opened, merged into the weights, and taken out again."""
    opened = [LoraFile.open(file) for file in files]
    layers = linears_of(pipe, {name: delta.shape for file in opened for name, delta in file.modules.items()})
    with merged(layers, *opened):
        make()


def with_klora(pipe: Any, pair: list[Path], cache: ScoreCache, make: Callable[[], Any], parts: Parts) -> None:
    """A picture with K-LoRA, whose parts are noted."""
    with parts.watched(pipe), klora.fuse(pipe, *pair, cache=cache):
        make()


def measure(
    pipe: Any, steps: int, pixels: int, rank: int, rounds: int
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Median seconds by way, and of K-LoRA's by part."""
    shapes = module_shapes(pipe, ("attention", "linear"))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    parts: dict[str, list[Parts]] = {way: [] for way in WAYS[3:]}

    def make() -> None:
        picture(pipe, steps, pixels)

    def seconds_of(function: Callable[[], Any]) -> float:
        return timed(function, device=pipe.unet.device)

    make()
    for round_ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            files = [write_lora(Path(folder) / f"{round_}-{i}.safetensors", shapes, rank, i) for i in range(4)]
            cache = ScoreCache(Path(folder) / "cache")
            seconds["no LoRA"].append(seconds_of(make))
            seconds["one LoRA"].append(seconds_of(lambda: with_merged(pipe, files[:1], make)))  # noqa: B023
            seconds["two LoRAs"].append(seconds_of(lambda: with_merged(pipe, files[:2], make)))  # noqa: B023
            for way, pair in zip((*WAYS[3:5], "", WAYS[5]), (files[:2], files[:2], files[2:], files[:2]), strict=True):
                found = Parts()
                taken = seconds_of(lambda: with_klora(pipe, pair, cache, make, found))  # noqa: B023
                if way:
                    seconds[way].append(taken)
                    parts[way].append(found)
            klora.release_memory()
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    by_part = {
        way: {name: statistics.median(one.seconds[name] for one in found) for name in found[0].seconds}
        for way, found in parts.items()
    }
    return medians, by_part


def report(seconds: dict[str, float], parts: dict[str, dict[str, float]]) -> None:
    """Print both as tables."""
    print("| picture | s | × one LoRA |\n| --- | ---: | ---: |")
    for way, value in seconds.items():
        print(f"| {way} | {value:.2f} | {value / seconds['one LoRA']:.2f} |")
    if parts:
        names = list(dict.fromkeys(name for found in parts.values() for name in found))
        print(f"\n| ms | {' | '.join(names)} |\n| --- |{' ---: |' * len(names)}")
        for way, found in parts.items():
            print(f"| {way} | {' | '.join(f'{found[name] * 1e3:.0f}' for name in names)} |")


def on_webui(url: str, loras: list[str], steps: int, pixels: int, rounds: int) -> dict[str, float]:
    """Median seconds of pictures that a running WebUI makes; of K-LoRA's first, those of the first round."""
    subject, style, *others = loras
    prompts = {
        "no LoRA": "a dog",
        "one LoRA": f"a dog <lora:{subject}:1>",
        "two LoRAs": f"a dog <lora:{subject}:1> <lora:{style}:1>",
        "K-LoRA, first": f"a dog <klora:{subject}:{style}>",
        "K-LoRA, second": f"a dog <klora:{subject}:{style}>",
    }
    if len(others) == 2:
        prompts |= {"another pair": f"a dog <klora:{others[0]}:{others[1]}>"}
        prompts |= {"K-LoRA, after another pair": f"a dog <klora:{subject}:{style}>"}
    found: dict[str, list[float]] = {way: [] for way in prompts}
    _txt2img(url, "a dog", steps, pixels)
    for _ in range(rounds):
        for way, prompt in prompts.items():
            found[way].append(timed(lambda: _txt2img(url, prompt, steps, pixels)))  # noqa: B023
    # Of files that have been seen before this run not even that is a first picture.
    found["K-LoRA, first"] = found["K-LoRA, first"][:1]
    return {way: statistics.median(times) for way, times in found.items()}


def _txt2img(url: str, prompt: str, steps: int, pixels: int) -> None:
    body = {"prompt": prompt, "steps": steps, "width": pixels, "height": pixels, "seed": 1, "sampler_name": "Euler"}
    request = urllib.request.Request(f"{url.rstrip('/')}/sdapi/v1/txt2img", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as answer:
        answer.read()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.picture", description="What whole pictures cost.")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pixels", type=int, default=256, help="side of the square picture")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="measurements, of which the median counts")
    parser.add_argument("--webui", metavar="URL", help="the root of a running WebUI, such as http://127.0.0.1:7860")
    parser.add_argument("--loras", nargs="+", default=[], metavar="NAME", help="two or four LoRAs of that WebUI")
    options = parser.parse_args()
    print(f"{describe_machine()}; {options.steps} steps, {options.pixels}×{options.pixels} pixels\n")
    if options.webui:
        if len(options.loras) not in (2, 4):
            parser.error("--loras: name two LoRAs, or four for another pair in between")
        report(on_webui(options.webui, options.loras, options.steps, options.pixels, options.rounds), {})
    else:
        report(*measure(make_pipeline(), options.steps, options.pixels, options.rank, options.rounds))


if __name__ == "__main__":
    main()
