"""`klora merge`: a fusion that is the same at every step, as one LoRA file that other programs load."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from klora import __version__
from klora.commands.console import warn
from klora.commands.options import add_settings, check_loras, read_settings, whole
from klora.errors import KloraError, SettingsError
from klora.report.files import OutputFile

if TYPE_CHECKING:
    from klora.merge import MergedLora
    from klora.pair import Pair
    from klora.settings import Settings

USAGE = "SUBJECT STYLE --policy NAME -o FILE [options]"
SPELLINGS = ("kohya", "diffusers")


def add_options(command: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    command.add_argument("subject", metavar="SUBJECT", help="the subject's .safetensors file")
    command.add_argument("style", metavar="STYLE", help="the style's .safetensors file")
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="the .safetensors file to write")
    command.add_argument(
        "--rank", type=whole(1), metavar="N", help="cut every module to this rank by SVD; kept as it is when left out"
    )
    command.add_argument(
        "--spelling",
        choices=SPELLINGS,
        default="kohya",
        help="of the keys: kohya, or diffusers, which is PEFT's (kohya)",
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
    target = OutputFile.check(args.output, (args.subject, args.style))
    check_loras(args.subject, args.style)

    import torch
    from safetensors.torch import save

    from klora.lora.write import file_tensors
    from klora.merge import check_static, merge
    from klora.pair import Pair
    from klora.report.summary import notices

    try:
        check_static(settings)
    except SettingsError as error:
        raise KloraError(f"--policy: {error.reason}") from None
    pair = Pair.open(args.subject, args.style)
    if args.spelling == "diffusers" and None in (pair.subject.table, pair.style.table):
        raise KloraError("--spelling diffusers: the modules of these files are known by flat names only; use kohya")
    made, plan = merge(pair, settings, args.rank)
    kernels, dtype = pair.subject.kernels | pair.style.kernels, getattr(torch, args.dtype)
    tensors = file_tensors(made.deltas, args.spelling, kernels, dtype, flux=pair.architecture == "FLUX")
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise KloraError(f"{key}: leaves the range of {args.dtype}; use --dtype float32")
    target.write(save(tensors, _metadata(pair, settings, made)))
    sys.stdout.write(
        f"{args.output}: {len(made.deltas)} modules, rank {made.rank}, by {plan.policy.title};"
        f" {made.lost_share:.2%} of the energy lost\n"
    )
    for notice in notices(pair, plan):
        warn(notice)


def _metadata(pair: Pair, settings: Settings, made: MergedLora) -> dict[str, str]:
    """What made the file; the keys that WebUIs show are those of kohya's trainer."""
    sides = {"subject": pair.subject, "style": pair.style}
    facts = {
        "version": __version__,
        "policy": settings.policy,
        "settings": settings.changed(),
        **{side: {"file": file.file_name, "sha256": pair.cache.digest(file)} for side, file in sides.items()},
        "lost_energy": made.lost_share,
    }
    bases = {file.metadata.get("ss_base_model_version") for file in sides.values()}
    shared = next(iter(bases)) if len(bases) == 1 else None
    return {
        "format": "pt",
        "klora": json.dumps(facts, sort_keys=True),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(made.rank),
        "ss_network_alpha": str(made.rank),
        **({"ss_base_model_version": shared} if shared else {}),
    }
