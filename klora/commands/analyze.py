"""`klora analyze`: which LoRA would act in which module at which step, without a model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from klora.commands.console import need, scoring_bar, warn
from klora.commands.options import add_settings, read_settings
from klora.errors import KloraError
from klora.report.files import OutputFile, png_bytes

USAGE = "SUBJECT STYLE [options]"


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    command.add_argument("subject", metavar="SUBJECT", help="the subject's .safetensors file")
    command.add_argument("style", metavar="STYLE", help="the style's .safetensors file")
    command.add_argument(
        "--json", metavar="FILE", help="write everything as JSON; - for stdout, and nothing else there"
    )
    command.add_argument("--picture", metavar="FILE.png", help="draw the selection map and the ρ of every module")
    add_settings(command)


def run(args: argparse.Namespace) -> None:
    """Check the targets, plan, write, and print the summary."""
    settings = read_settings(args)
    inputs = (args.subject, args.style)
    to_stdout = args.json == "-"
    json_file = OutputFile.check(args.json, inputs) if args.json is not None and not to_stdout else None
    picture = _check_picture(args.picture, inputs) if args.picture is not None else None
    if json_file and picture and json_file == picture and not picture.special:
        raise KloraError(f"{args.picture}: is named for the JSON and for the picture; name two files")

    from klora.pair import Pair
    from klora.report.document import document
    from klora.report.summary import notices, summarise

    pair = Pair.open(args.subject, args.style)
    plan = pair.plan(settings, on_scored=scoring_bar())
    text = json.dumps(document(pair, plan), indent=1, allow_nan=False) + "\n" if args.json is not None else ""
    if picture:
        from klora.report.picture import selection_map

        picture.write(png_bytes(selection_map(plan, f"{pair.subject.name} × {pair.style.name}")))
    if json_file:
        json_file.write(text.encode())
    sys.stdout.write(text if to_stdout else summarise(pair, plan) + "\n")
    for notice in notices(pair, plan):
        warn(notice)


def _check_picture(path: str, inputs: Iterable[str]) -> OutputFile:
    if Path(path).suffix.lower() != ".png":
        raise KloraError(f"--picture: {path} must end in .png, which is what is written")
    need("--picture", "matplotlib")
    return OutputFile.check(path, inputs)
