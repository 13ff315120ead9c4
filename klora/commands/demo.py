"""`klora demo`: the LoRAs of the project fused with the model of the project, on one sheet."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klora.commands.console import need
from klora.commands.options import PREFIX, SIDES, read_weight
from klora.demo import catalogue
from klora.errors import KloraError
from klora.report.files import OutputFile, output_folder, png_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

    from klora.fusion.plan import FusionPlan

USAGE = "[--out DIR]"
SEEDS = (1, 2)


@dataclass(frozen=True)
class Column:
    """One way to use two LoRAs: a heading, its settings, and which of the catalogue's prompts is asked of it."""

    title: str
    settings: Mapping[str, Any]
    prompt: str


COLUMNS = (
    Column("subject alone", {"policy": "direct", "style_strength": 0}, "subject"),
    Column("style alone", {"policy": "direct", "subject_strength": 0}, "style"),
    Column("plain merge", {"policy": "direct"}, "both"),
    Column("K-LoRA", {}, "both"),
)


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    command.add_argument("--out", default="klora-demo", metavar="DIR", help="where the pictures go (klora-demo)")


def run(args: argparse.Namespace) -> None:
    """Make the sheet and the map, and print where they are."""
    need("klora demo", "diffusers", "transformers", "matplotlib")
    for line in run_demo(output_folder(args.out)):
        print(line, flush=True)


def fill_in_demo_model(args: argparse.Namespace) -> AbstractContextManager[None]:
    """Fill in the project's model, and how it generates best where the user does not say otherwise."""
    if args.model is not None:
        raise KloraError("--model: not allowed with --demo, which has its own")
    known = catalogue.read_catalogue(catalogue.HOME)
    args.model = str(catalogue.HOME / known["model"])
    if args.guidance is None:
        args.guidance = known["recommended"]["guidance_scale"]
    if getattr(args, f"{PREFIX}steps") is None:
        setattr(args, f"{PREFIX}steps", str(known["recommended"]["steps"]))
    return catalogue.one_thread()


def fill_in_demo_pair(args: argparse.Namespace) -> AbstractContextManager[None]:
    """Fill in the project's model and the files of its own that the user names, or its first pair.

    The prompt is that of the first of each side.
    """
    quick = fill_in_demo_model(args)
    known = catalogue.read_catalogue(catalogue.HOME)
    first = []
    for side in SIDES:
        parts = [read_weight(text, side) for text in getattr(args, side) or [next(iter(known[f"{side}s"]))]]
        files = [(catalogue.lora_file(known, catalogue.HOME, side, name), weight) for name, weight in parts]
        setattr(args, side, [f"{file}:{weight}" for file, weight in files])
        first.append(parts[0][0])
    args.prompt = args.prompt or catalogue.demo_pair(known, catalogue.HOME, *first).prompts["both"]
    return quick


def run_demo(folder: Path, home: Path | None = None) -> Iterator[str]:
    """Generate every pair in every column for a few seeds; write a contact sheet and a selection map, and say where.

    Needs no network and no GPU. Raises KloraError where the installation lacks the model or `folder` takes no files.
    """
    import torch
    from tqdm import tqdm

    from klora.api import fuse
    from klora.generation.pipeline import load_pipeline
    from klora.report.picture import selection_map
    from klora.report.sheet import contact_sheet

    home = home or catalogue.HOME
    known = catalogue.read_catalogue(home)
    pairs = catalogue.demo_pairs(known, home)
    targets = {name: OutputFile.check(folder / f"{name}.png") for name in ("contact-sheet", "selection-map")}
    pipe = load_pipeline(str(home / known["model"]), torch.float32)
    recommended = known["recommended"]
    pipe.set_progress_bar_config(disable=True)
    groups: list[list[list[Image]]] = []
    maps: list[tuple[str, FusionPlan]] = []
    total = len(pairs) * len(COLUMNS)
    with catalogue.one_thread(), tqdm(total=total, desc="generating", unit="cell", leave=False) as bar:
        for pair in pairs:
            groups.append([])
            for column in COLUMNS:
                with fuse(pipe, *pair.files, **column.settings) as session:
                    groups[-1].append(generate(pipe, pair.prompts[column.prompt], recommended, SEEDS))
                bar.update()
            # The last column is K-LoRA, and its session knows the schedule that was really followed.
            maps.append((f"{pair.subject} × {pair.style}", session.plan))
    headings = [(column.title, _asked(column, pairs)) for column in COLUMNS]
    rows = [(f"{pair.subject}", f"× {pair.style}") for pair in pairs]
    title, plan = maps[0]
    for (name, target), image in zip(
        targets.items(), (contact_sheet(groups, headings, rows), selection_map(plan, title)), strict=True
    ):
        target.write(png_bytes(image))
        yield f"{name.replace('-', ' ')}: {target.path}"


def generate(pipe: Any, prompt: str, recommended: Mapping[str, Any], seeds: Sequence[int]) -> list[Image]:
    """One picture of a prompt for each seed, with the steps and the guidance that the catalogue recommends."""
    import torch

    images: list[Image] = pipe(
        [prompt] * len(seeds),
        num_inference_steps=recommended["steps"],
        guidance_scale=recommended["guidance_scale"],
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
    ).images
    return images


def _asked(column: Column, pairs: list[catalogue.DemoPair]) -> str:
    """The prompt of a column, which differs from row to row in what it names."""
    prompts = {pair.prompts[column.prompt] for pair in pairs}
    return f"“{prompts.pop()}”" if len(prompts) == 1 else f"“{pairs[0].prompts[column.prompt]}” …"
