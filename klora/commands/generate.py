"""`klora generate`: pictures from a diffusers pipeline, each with all that made it in its PNG."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from klora.balance.search import check_findable
from klora.commands.balance import find_in, lines
from klora.commands.console import need, scoring_bar, warn
from klora.commands.options import (
    MODEL,
    PREFIX,
    RENAMED,
    SIDE_FILES,
    add_pictures,
    add_settings,
    add_sides,
    check_loras,
    read_request,
    read_settings,
    read_sides,
    whole,
)
from klora.generation.picture_file import next_number, write_picture
from klora.generation.request import GenerationRequest
from klora.report.files import output_folder
from klora.settings import options

if TYPE_CHECKING:
    from klora.engine.session import Session
    from klora.generation.generate import GeneratedPicture

SHARE, FIND = f"{PREFIX}share", "find"
USAGE = "--model M --subject F --style F --prompt TEXT [options]"


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    command.add_argument("--model", required=True, metavar="FOLDER|ID", help=MODEL)
    add_sides(command, SIDE_FILES, required=True)
    command.add_argument("--prompt", required=True, metavar="TEXT", help="what the picture is to show")
    command.add_argument(
        "--images", type=whole(1), default=1, metavar="N", help="pictures, each with the next seed (1)"
    )
    command.add_argument("--map", action="store_true", help="draw a selection map beside the pictures")
    add_pictures(command, "klora-out")
    share = f"{options()['share'].help}; {FIND}: the one that the LoRAs themselves find best (klora balance)"
    add_settings(command, RENAMED, {"steps": "sampling steps", "share": share})


def run(args: argparse.Namespace) -> None:
    """Make the pictures and print the path of each file."""
    find = getattr(args, SHARE) == FIND
    if find:
        setattr(args, SHARE, None)
    settings = read_settings(args, RENAMED)
    if find:
        check_findable(settings)
    need("klora generate", "diffusers", "transformers")
    if args.map:
        need("klora generate --map", "matplotlib")
    output_folder(args.out)
    read_sides(args)
    check_loras(args)
    request = dataclasses.replace(read_request(args, settings), images=args.images, map=args.map)
    for path in generate_pictures(request, warn, find):
        print(path, flush=True)


def generate_pictures(
    request: GenerationRequest, warn: Callable[[str], None], find_share: bool = False
) -> Iterator[Path]:
    """Make the pictures one after the other and give the path of each file as it is written.

    With `find_share`, the share of all of them is found first.

    Raises KloraError for a model, a file or a setting that does not do, before anything is sampled.
    """
    from klora.generation.generate import generate, session_notices
    from klora.generation.pipeline import call_arguments, open_pipeline
    from klora.pair import Pair

    # The files first: they are checked in an instant, and a model may take minutes.
    Pair.open(request.subject, request.style)
    pipe = open_pipeline(request)
    call_arguments(pipe, request)
    folder = output_folder(request.out)
    if find_share:
        found = find_in(pipe, request)
        for line in lines(found):
            print(f"klora: {line}", file=sys.stderr, flush=True)
        request = dataclasses.replace(request, settings=dataclasses.replace(request.settings, share=found.share))

    def announce(number: int, session: Session) -> None:
        for notice in session_notices(session) if number == 1 else ():
            warn(notice)
        forwards = session.plan.policy.forwards
        cost = f" ({forwards} forwards per step)" if forwards > 1 else ""
        pipe.set_progress_bar_config(desc=f"picture {number} of {request.images}{cost}")

    seeds = range(request.seed, request.seed + request.images)
    for generated in generate(pipe, request, seeds, announce, scoring_bar()):
        yield from _save(generated, folder, request.map)


def _save(generated: GeneratedPicture, folder: Path, with_map: bool) -> Iterator[Path]:
    facts, session = generated.facts, generated.session
    stem = f"{next_number(folder):05d}-{facts['seed']}"
    yield write_picture(generated.image, folder / f"{stem}.png", facts)
    if with_map:
        from klora.report.picture import selection_map

        title = f"{session.pair.subject.name} × {session.pair.style.name}"
        yield write_picture(selection_map(session.observed, title), folder / f"{stem}-map.png", facts)
