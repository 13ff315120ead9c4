"""`klora analyze`: which LoRA would act in which module at which step, without a model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from klora.commands.console import need, scoring_bar, warn
from klora.commands.options import add_pair, add_settings, check_loras, read_pair, read_settings, side_paths
from klora.errors import KloraError
from klora.report.files import OutputFile, png_bytes

USAGE = "SUBJECT STYLE [options]"


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_pair(command)
    command.add_argument(
        "--json", metavar="FILE", help="write everything as JSON; - for stdout, and nothing else there"
    )
    command.add_argument("--picture", metavar="FILE.png", help="draw the selection map and the ρ of every module")
    command.add_argument(
        "--overlap-picture", metavar="FILE.png", help="draw how much both files are in each other's way, by block"
    )
    add_settings(command)


def run(args: argparse.Namespace) -> None:
    """Check the targets, plan, write, and print the summary."""
    settings = read_settings(args)
    read_pair(args)
    inputs = side_paths(args)
    to_stdout = args.json == "-"
    json_file = OutputFile.check(args.json, inputs) if args.json is not None and not to_stdout else None
    pictures = {
        option: _check_picture(f"--{option}", path, inputs)
        for option, path in (("picture", args.picture), ("overlap-picture", args.overlap_picture))
        if path is not None
    }
    files = [file for file in (json_file, *pictures.values()) if file and not file.special]
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise KloraError(f"{twice.path}: is named for two of the results; name two files")

    check_loras(args)
    from klora.pair import Pair
    from klora.report.document import document
    from klora.report.overlap import overlap_of
    from klora.report.summary import notices, summarise

    pair = Pair.open(args.subject, args.style)
    plan = pair.plan(settings, on_scored=scoring_bar())
    overlap = overlap_of(pair, plan, scoring_bar("comparing them"))
    text = ""
    if args.json is not None:
        text = json.dumps(document(pair, plan, overlap), indent=1, allow_nan=False) + "\n"
    title = f"{pair.subject.name} × {pair.style.name}"
    if target := pictures.get("picture"):
        from klora.report.picture import selection_map

        target.write(png_bytes(selection_map(plan, title)))
    if target := pictures.get("overlap-picture"):
        from klora.report.overlap_picture import overlap_picture

        target.write(png_bytes(overlap_picture(overlap, title)))
    if json_file:
        json_file.write(text.encode())
    sys.stdout.write(text if to_stdout else summarise(pair, plan, overlap) + "\n")
    for notice in notices(pair, plan):
        warn(notice)


def _check_picture(option: str, path: str, inputs: Iterable[str]) -> OutputFile:
    if Path(path).suffix.lower() != ".png":
        raise KloraError(f"{option}: {path} must end in .png, which is what is written")
    need(option, "matplotlib")
    return OutputFile.check(path, inputs)
