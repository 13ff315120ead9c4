"""`klora balance`: the share that a pair should have, found by its own LoRAs, with the pictures it was found by."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from klora.balance.search import check_findable
from klora.commands.console import need
from klora.commands.demo import fill_in_demo_pair
from klora.commands.options import (
    MODEL,
    RENAMED,
    SIDE_FILES,
    add_pictures,
    add_settings,
    add_sides,
    check_loras,
    demand,
    read_request,
    read_settings,
    read_sides,
    side_paths,
    stems,
)
from klora.errors import KloraError
from klora.report.files import OutputFile, output_folder, png_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

    from klora.generation.balance import Balance
    from klora.generation.request import GenerationRequest

USAGE = "(--model M --subject F --style F --prompt T | --demo) …"
SHEET = "balance.png"
CELL, WIDE = 320, 256
"""Pixels of the longer side of a large picture on the sheet, and of a small one's width."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    command.add_argument("--model", metavar="FOLDER|ID", help=MODEL)
    add_sides(command, SIDE_FILES)
    command.add_argument(
        "--demo",
        nargs="*",
        metavar="NAME",
        help="use the model and a pair that come with the project: its subject and its style, or the first of each",
    )
    command.add_argument("--prompt", metavar="TEXT", help="what the pictures are to show, trigger words included")
    command.add_argument(
        "--subject-prompt", metavar="TEXT", help="what the subject's LoRA alone is told when it judges (the prompt)"
    )
    command.add_argument(
        "--style-prompt", metavar="TEXT", help="what the style's LoRA alone is told when it judges (the prompt)"
    )
    command.add_argument(
        "--json", metavar="FILE", help="write what was found as JSON; - for stdout, and nothing else there"
    )
    add_pictures(command, "klora-balance")
    add_settings(command, RENAMED, {"steps": "sampling steps"}, without=("balance", "share"))


def run(args: argparse.Namespace) -> None:
    """Say what it costs, find the balance, write the sheet, and print what was found."""
    need("klora balance", "diffusers", "transformers", "matplotlib")
    quick = _fill_in_demo(args) if args.demo is not None else contextlib.nullcontext()
    demand(args, "model", "subject", "style", "prompt")
    settings = read_settings(args, RENAMED)
    read_sides(args)
    check_findable(settings)
    to_stdout = args.json == "-"
    target = None
    if args.json is not None and not to_stdout:
        target = OutputFile.check(args.json, side_paths(args))
    sheet = OutputFile.check(output_folder(args.out) / SHEET)
    check_loras(args)
    request = read_request(args, settings)
    with quick:
        found = _find(request, args.subject_prompt, args.style_prompt)
    sheet.write(png_bytes(_sheet(found, (stems(args.subject), stems(args.style)))))
    text = json.dumps(document(found), indent=1, allow_nan=False) + "\n"
    if target:
        target.write(text.encode())
    sys.stdout.write(text if to_stdout else "\n".join((*lines(found), f"sheet: {sheet.path}")) + "\n")


def _find(request: GenerationRequest, subject_prompt: str | None, style_prompt: str | None) -> Balance:
    from klora.generation.pipeline import open_pipeline
    from klora.pair import Pair

    # The files first: they are checked in an instant, and a model may take minutes.
    Pair.open(request.subject, request.style)
    return find_in(open_pipeline(request), request, subject_prompt, style_prompt)


def find_in(
    pipe: Any, request: GenerationRequest, subject_prompt: str | None = None, style_prompt: str | None = None
) -> Balance:
    """Find the balance of a request in its pipeline; says what that costs, and shows how far it is.

    Each LoRA alone judges under its own prompt where it is given one. Raises what `find_balance` raises.
    """
    from tqdm import tqdm

    from klora.generation.balance import cost, find_balance
    from klora.generation.pipeline import call_arguments, memory_errors

    call = call_arguments(pipe, request)
    whole = cost(request.settings.steps)
    print(f"klora: finding the balance takes as long as {whole:.2g} pictures", file=sys.stderr, flush=True)
    pipe.set_progress_bar_config(disable=True)
    with memory_errors(), tqdm(total=round(whole, 2), unit="picture", leave=False, disable=None) as bar:

        def show(what: str, done: float) -> None:
            bar.set_description(what, refresh=False)
            bar.update(done - bar.n)

        return find_balance(
            pipe,
            request.subject,
            request.style,
            prompt=call.pop("prompt"),
            subject_prompt=subject_prompt,
            style_prompt=style_prompt,
            picture_seed=request.seed,
            call=call,
            on_stage=show,
            **request.settings.to_dict(),
        )


def document(found: Balance) -> dict[str, Any]:
    """What was found, ready for JSON: the share, and the candidates with the part of each LoRA."""
    return {
        "share": found.share,
        "candidates": [
            {
                "share": candidate.share,
                "subject": round(candidate.parts.subject, 4),
                "style": round(candidate.parts.style, 4),
            }
            for candidate in found.candidates
        ],
    }


def lines(found: Balance) -> list[str]:
    """What was found, in words."""
    tried = [f"share {one.share:.1f}: {one.parts}" for one in found.candidates]
    return [*tried, f"take --share {found.share:g}"]


def _sheet(found: Balance, names: tuple[str, str]) -> Image:
    """The candidates from most style to most subject, the one to take marked."""
    from klora.report.sheet import contact_sheet

    columns, pictures = [], []
    for one, image in zip(found.candidates, found.images, strict=True):
        title = f"share {one.share:g}" + (" ← take this" if one.share == found.share else "")
        columns.append((title, str(one.parts)))
        small = image.copy()
        small.thumbnail((CELL, CELL))
        pictures.append([small])
    return contact_sheet([pictures], columns, [(names[0], f"× {names[1]}")], side=WIDE)


def _fill_in_demo(args: argparse.Namespace) -> AbstractContextManager[None]:
    """Fill in the project's model and the pair that `--demo` names."""
    if args.subject or args.style:
        raise KloraError("--demo: takes its pair by name, as in --demo bolt engraving; leave out --subject and --style")
    if len(args.demo) not in (0, 2):
        raise KloraError(f"--demo: takes a subject and a style, or nothing; got {' '.join(args.demo)}")
    args.subject, args.style = ([name] for name in args.demo) if args.demo else (None, None)
    return fill_in_demo_pair(args)
