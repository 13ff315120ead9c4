"""`klora compare`: one pair by several methods, on one contact sheet, with the time of each picture."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from klora.commands.console import need, scoring_bar, warn
from klora.commands.demo import fill_in_demo_pair
from klora.commands.options import (
    MODEL,
    RENAMED,
    SIDE_FILES,
    add_methods,
    add_pictures,
    add_settings,
    add_sides,
    check_loras,
    demand,
    read_request,
    read_settings,
    read_sides,
    stems,
)
from klora.errors import KloraError
from klora.generation.methods import Method, read_methods
from klora.generation.picture_file import next_number, write_picture
from klora.generation.request import GenerationRequest
from klora.report.files import OutputFile, csv_bytes, output_folder, png_bytes
from klora.report.sheet import contact_sheet
from klora.text import count_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from klora.engine.session import Session
    from klora.generation.generate import GeneratedPicture

CELL = 320
"""Pixels of the longer side of a picture on the sheet, where it is larger; its file keeps them all."""
HEADER = ("policy", "seed", "seconds_per_image", "forwards_per_step", "picture", "note")


USAGE = "(--model M --subject FILE --style FILE | --demo) [options]"


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    command.add_argument("--model", metavar="FOLDER|ID", help=MODEL)
    add_sides(command, f"{SIDE_FILES}; with --demo, the name of one of its own")
    command.add_argument("--demo", action="store_true", help="use the model and the LoRAs that come with the project")
    command.add_argument(
        "--prompt", metavar="TEXT", help="what the pictures are to show; made of the files' names when left out"
    )
    add_methods(command, "all", "4")
    add_pictures(command, "klora-compare")
    add_settings(command, RENAMED, {"steps": "sampling steps"}, without=("policy",))


def run(args: argparse.Namespace) -> None:
    """Make the pictures, the sheet and the table, and print what each method costs and where things are."""
    need("klora compare", "diffusers", "transformers", "matplotlib")
    quick = fill_in_demo_pair(args) if args.demo else contextlib.nullcontext()
    demand(args, "model", "subject", "style")
    settings = read_settings(args, RENAMED)
    methods = read_methods(args.policies or "all", settings)
    read_sides(args)
    if args.prompt is None:
        args.prompt = f"a {stems(args.subject)} in {stems(args.style)} style"
        warn(f"no --prompt is given; generating “{args.prompt}”: give the words that the LoRAs were trained on")
    output_folder(args.out)
    check_loras(args)
    request = dataclasses.replace(read_request(args, settings), images=args.seeds or 4)
    with quick:
        for line in compare_pair(request, methods, warn):
            print(line, flush=True)


@dataclass
class Row:
    """What came of one method: its pictures, or why it has none."""

    method: Method
    pictures: list[Image] = field(default_factory=list)
    table: list[tuple[str, ...]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    forwards: float = 0.0
    reason: str | None = None

    @property
    def cost(self) -> str:
        """Say what a picture costs."""
        return f"{count_of(self.forwards, 'forward')} per step, {median(self.seconds):.3g} s per image"


def compare_pair(request: GenerationRequest, methods: Sequence[Method], warn: Callable[[str], None]) -> Iterator[str]:
    """Generate the pictures of a request by every method; write each, the contact sheet and the table, and say where.

    A method that does not run on this model or with this pair is named with its reason. Raises KloraError for a
    model or a file that does not do, and where no method runs.
    """
    from klora.generation.pipeline import call_arguments, open_pipeline
    from klora.pair import Pair

    Pair.open(request.subject, request.style)
    pipe = open_pipeline(request)
    call_arguments(pipe, request)
    folder = output_folder(request.out)
    sheet, table = (OutputFile.check(folder / name) for name in ("contact-sheet.png", "times.csv"))
    rows = []
    said: set[str] = set()

    def say_once(text: str) -> None:
        if text not in said:
            said.add(text)
            warn(text)

    for method in methods:
        rows.append(_row(pipe, request, method, say_once))
        yield f"{method.name}: {rows[-1].reason or rows[-1].cost}"
    done = [row for row in rows if row.pictures]
    if not done:
        raise KloraError(f"none of the policies runs here; {methods[0].name}: {rows[0].reason}")
    sheet.write(png_bytes(_sheet(done, _seeds(request))))
    yield f"contact sheet: {sheet.path}"
    table.write(csv_bytes([HEADER, *(line for row in rows for line in row.table)]))
    yield f"times: {table.path}"


def _seeds(request: GenerationRequest) -> range:
    return range(request.seed, request.seed + request.images)


def _row(pipe: Any, request: GenerationRequest, method: Method, warn: Callable[[str], None]) -> Row:
    from klora.generation.generate import generate, session_notices

    row = Row(method)

    def announce(number: int, session: Session) -> None:
        for notice in session_notices(session) if number == 1 else ():
            warn(notice)
        cost = count_of(row.forwards or method.forwards, "forward")
        pipe.set_progress_bar_config(
            desc=f"{method.name}, picture {number} of {request.images}, {cost} per step", leave=False
        )

    asked = dataclasses.replace(request, settings=method.settings)
    with closing(generate(pipe, asked, _seeds(request), announce, scoring_bar())) as pictures:
        while True:
            try:
                generated = next(pictures, None)
            except KloraError as error:
                return _failed(method, error)
            if generated is None:
                return row
            _add(row, generated, request.out)


def _failed(method: Method, error: KloraError) -> Row:
    reason = f"cannot run: {error}"
    return Row(method, table=[(method.name, "", "", "", "", reason)], reason=reason)


def _add(row: Row, generated: GeneratedPicture, folder: Path) -> None:
    seed = generated.facts["seed"]
    path = folder / f"{next_number(folder):05d}-{row.method.slug}-{seed}.png"
    write_picture(generated.image, path, generated.facts)
    small = generated.image.copy()
    small.thumbnail((CELL, CELL))
    row.pictures.append(small)
    row.seconds.append(generated.seconds)
    row.forwards = generated.forwards
    row.table.append((row.method.name, str(seed), f"{generated.seconds:.4f}", f"{generated.forwards:g}", path.name, ""))


def _sheet(rows: Sequence[Row], seeds: Sequence[int]) -> Image:
    groups = [[[picture] for picture in row.pictures] for row in rows]
    return contact_sheet(
        groups, [(f"seed {seed}", "") for seed in seeds], [(row.method.name, row.cost) for row in rows]
    )
