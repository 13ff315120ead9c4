"""`klora evaluate`: policies scored on subjects and styles of one's own; the work is in `klora.evaluation`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from functools import partial
from typing import TYPE_CHECKING

from klora.commands.console import need, scoring_bar
from klora.commands.demo import fill_in_demo_model
from klora.commands.options import (
    MODEL,
    RENAMED,
    add_methods,
    add_pictures,
    add_settings,
    demand,
    read_request,
    read_settings,
    whole,
)
from klora.errors import KloraError
from klora.generation.methods import read_methods
from klora.settings import Settings

if TYPE_CHECKING:
    from klora.evaluation.run import Evaluation

USAGE = "(FOLDER|FILE.json --model FOLDER|ID | --demo) [options]"
CLIP, DINO = Settings().clip_model, Settings().dino_model


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    command.add_argument(
        "study",
        nargs="?",
        metavar="FOLDER|FILE.json",
        help="subjects/NAME and styles/NAME, each with a LoRA and reference pictures; docs/evaluate.md",
    )
    command.add_argument("--model", metavar="FOLDER|ID", help=MODEL)
    command.add_argument("--demo", action="store_true", help="evaluate the project's own model with its judge, offline")
    command.add_argument("--held-out", action="store_true", help="with --demo: only pairs that no fusion was chosen on")
    command.add_argument(
        "--prompt",
        metavar="TEXT",
        help="what the pictures are to show; {subject} and {style} stand for the words of each",
    )
    add_methods(command, "k-lora,direct; with --demo: all", "10; with --demo: 2")
    command.add_argument("--pairs", type=whole(1), metavar="N", help="pairs drawn from all, as Table 1 draws 18 (all)")
    command.add_argument("--pairs-seed", type=whole(0), default=0, metavar="N", help="seed of that draw (0)")
    command.add_argument("--clip", metavar="FOLDER|ID", default=CLIP, help=f"CLIP model of two of the scores ({CLIP})")
    command.add_argument("--dino", metavar="FOLDER|ID", default=DINO, help=f"DINO model of the third ({DINO})")
    add_pictures(command, "klora-evaluation")
    add_settings(command, RENAMED, {"steps": "sampling steps"}, without=("policy",))


def run(args: argparse.Namespace) -> None:
    """Make and score the pictures, and print the table and where it is."""
    need("klora evaluate", "diffusers", "transformers", "accelerate")
    quick = fill_in_demo_model(args) if args.demo else contextlib.nullcontext()
    demand(args, "model", *([] if args.demo else ["study"]))
    if args.held_out and not args.demo:
        raise KloraError("--held-out: says which pairs of --demo are evaluated; give --demo too, or leave it out")
    settings = read_settings(args, RENAMED)

    from klora.evaluation.run import evaluate_study

    with quick:
        for line in evaluate_study(_evaluation(args, settings), scoring_bar()):
            print(line, flush=True)


def _evaluation(args: argparse.Namespace, settings: Settings) -> Evaluation:
    from klora.evaluation import demo_study
    from klora.evaluation.metrics import ClipDino
    from klora.evaluation.run import Evaluation
    from klora.evaluation.study import TEMPLATE, draw_pairs, read_study
    from klora.evaluation.teaching import arrange
    from klora.generation.pipeline import model_name

    methods = read_methods(args.policies or (demo_study.METHODS if args.demo else "k-lora,direct"), settings)
    request = dataclasses.replace(read_request(args, settings), images=args.seeds or (2 if args.demo else 10))
    pairs = demo_study.demo_study(args.held_out) if args.demo else read_study(args.study, args.prompt or TEMPLATE)
    drawn = [f"{args.pairs} of {len(pairs)} pairs, drawn with seed {args.pairs_seed}"] if args.pairs else []
    if args.pairs:
        pairs = draw_pairs(pairs, args.pairs, args.pairs_seed)
    drawn += [demo_study.HELD_OUT] if args.held_out else []
    if args.demo:
        notes = (*drawn, *demo_study.NOTES)
        teaching = arrange(pairs, methods, {})
        return Evaluation(demo_study.TITLE, request, teaching, methods, demo_study.Recognition, notes)
    teaching = arrange(pairs, methods, {"--clip": args.clip, "--dino": args.dino})
    models = (f"style similarity and CLIP score: {model_name(args.clip)}", f"DINO score: {model_name(args.dino)}")
    scorer = partial(ClipDino, args.clip, args.dino)
    return Evaluation("Evaluation", request, teaching, methods, scorer, (*drawn, *models))
