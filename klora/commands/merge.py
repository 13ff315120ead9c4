"""`klora merge`: a fusion that is the same at every step, as one LoRA file that other programs load."""

from __future__ import annotations

import argparse
import sys

from klora.commands.console import warn
from klora.commands.options import add_pair, add_settings, check_loras, read_pair, read_settings, side_paths, whole
from klora.errors import KloraError
from klora.lora.spelling import SPELLINGS, spelling_of
from klora.report.files import OutputFile
from klora.text import count_of

USAGE = "SUBJECT STYLE --policy NAME -o FILE [options]"


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_pair(command)
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="the .safetensors file to write")
    command.add_argument(
        "--rank", type=whole(1), metavar="N", help="cut every module to this rank by SVD; kept as it is when left out"
    )
    command.add_argument(
        "--spelling",
        choices=SPELLINGS,
        help="of the keys: kohya, or diffusers, which is PEFT's (that of both inputs where they agree, else kohya)",
    )
    command.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="of the tensors (float16)"
    )
    add_settings(command)


def run(args: argparse.Namespace) -> None:
    """Check, merge, write, and say what was written."""
    settings = read_settings(args)
    if not args.output.lower().endswith(".safetensors"):
        raise KloraError(f"--output: {args.output} must end in .safetensors, which is what is written")
    read_pair(args)
    target = OutputFile.check(args.output, side_paths(args))
    check_loras(args)

    import torch

    from klora.merge import check_static, fused_file, merge
    from klora.pair import Pair
    from klora.report.summary import notices

    check_static(settings)
    pair = Pair.open(args.subject, args.style)
    spelling = spelling_of(pair.loras, args.spelling)
    made, plan = merge(pair, settings, args.rank)
    target.write(fused_file(pair, settings, made, getattr(torch, args.dtype), spelling))
    sys.stdout.write(
        f"{args.output}: {count_of(len(made.deltas), 'module')}, rank {made.rank}, by {plan.policy.title};"
        f" {made.lost_share:.2%} of the energy lost\n"
    )
    for notice in notices(pair, plan):
        warn(notice)
