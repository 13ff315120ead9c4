"""`klora measure-discrepancy`: the number that EST-LoRA measures of a pair, from one probe picture of each LoRA."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

from klora.commands.console import need
from klora.commands.options import MODEL, add_pair, add_pictures, check_loras, read_pair, read_request, whole
from klora.errors import KloraError
from klora.report.files import output_folder
from klora.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

USAGE = "SUBJECT STYLE --model M --prompt TEXT [options]"


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_pair(command)
    command.add_argument("--model", metavar="FOLDER|ID", help=MODEL)
    command.add_argument("--prompt", metavar="TEXT", help="of both pictures, such as: a sbu dog in szn style")
    command.add_argument("--subject-refs", metavar="PATHS", help="pictures, or a folder of them, in place of a probe")
    command.add_argument("--style-refs", metavar="PATHS", help="pictures, or a folder of them, in place of a probe")
    command.add_argument(
        "--dino-model", default=Settings().dino_model, metavar="FOLDER|ID", help=f"the DINO ({Settings().dino_model})"
    )
    command.add_argument("--steps", type=whole(1), default=30, metavar="N", help="sampling steps (30)")
    add_pictures(command, "klora-probe")


def run(args: argparse.Namespace) -> None:
    """Make or read the pictures, compare them, and print d."""
    if bool(args.subject_refs) != bool(args.style_refs):
        raise KloraError("--subject-refs: goes with --style-refs; give both, or neither and a --model")
    if not args.subject_refs:
        _demand_probe(args)
    need("klora measure-discrepancy", "transformers")

    from klora.generation.discrepancy import discrepancy
    from klora.generation.pipeline import choose_device
    from klora.vision import load_dino

    device = choose_device(args.device)
    # Before the pictures, which may take minutes: where there is no such model, they are for nothing.
    dino = load_dino(args.dino_model, device)
    d = discrepancy(dino, *(_read(args) if args.subject_refs else _probe(args)))
    sys.stdout.write(f"{d:.4f}\n")


def _read(args: argparse.Namespace) -> tuple[list[Tensor], list[Tensor]]:
    from klora.hosts.guidance import read_images

    return read_images("subject_refs", args.subject_refs), read_images("style_refs", args.style_refs)


def _demand_probe(args: argparse.Namespace) -> None:
    read_pair(args)
    for name in ("model", "prompt"):
        if not getattr(args, name):
            raise KloraError(f"--{name}: is needed for probe pictures; or give --subject-refs and --style-refs")
    need("klora measure-discrepancy --model", "diffusers")
    check_loras(args)


def _probe(args: argparse.Namespace) -> tuple[list[Tensor], list[Tensor]]:
    from klora.generation.discrepancy import pixels_of, probe_pictures
    from klora.generation.picture_file import write_picture
    from klora.generation.pipeline import open_pipeline
    from klora.pair import Pair

    # The files first: they are checked in an instant, and a model may take minutes.
    Pair.open(args.subject, args.style)
    request = read_request(args, Settings(policy="direct", steps=args.steps))
    pipe = open_pipeline(request)
    request = dataclasses.replace(request, out=output_folder(request.out))
    images = []
    for name, made in zip(("subject", "style"), probe_pictures(pipe, request), strict=True):
        print(write_picture(made.image, request.out / f"probe-{name}.png", made.facts), file=sys.stderr, flush=True)
        images.append(pixels_of(made.image))
    return [images[0]], [images[1]]
