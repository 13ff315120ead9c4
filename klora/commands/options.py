"""Options that several commands share, and what they are read into."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from klora.errors import KloraError, SettingsError
from klora.fusion.policies import POLICIES, make_policy, policies_with, resolve
from klora.generation.request import GenerationRequest
from klora.lora.disk import check_readable
from klora.lora.weighted import split_weight
from klora.settings import AUTO, Option, Settings, options
from klora.text import printable

MODEL = "a diffusers folder, or a hub id"
SIDES = ("subject", "style")
SIDE_FILES = "the {}'s .safetensors file, or several; each with :WEIGHT if that is not 1: coat.safetensors:0.5"
PREFIX = "setting_"
"""Begins the attribute of every setting among the parsed arguments."""
AS_THEY_ARE: Mapping[str, str] = MappingProxyType({})
RENAMED: Mapping[str, str] = MappingProxyType({"seed": "selection-seed"})
"""Settings whose plain name means something else where pictures are made: there, `--seed` is the picture's."""


def add_pictures(command: argparse.ArgumentParser, out: str) -> None:
    """Add how pictures are generated, which is the same for all commands that do so with any model."""
    group = command.add_argument_group("pictures")
    group.add_argument("--negative-prompt", metavar="TEXT", help="what to avoid")
    group.add_argument("--seed", type=whole(0), default=0, metavar="N", help="seed of the first picture (0)")
    group.add_argument("--size", type=size, metavar="WxH|N", help="in pixels; the model's own when left out")
    group.add_argument("--guidance", type=finite, metavar="X", help="guidance scale; the pipeline's own when left out")
    group.add_argument("--out", default=out, metavar="DIR", help=f"where the results go ({out})")
    group.add_argument("--device", default=AUTO, metavar="NAME", help="auto, cpu, cuda, cuda:1, mps …")
    group.add_argument("--dtype", default=AUTO, choices=(AUTO, "float32", "float16", "bfloat16"), help="of the model")


def add_methods(command: argparse.ArgumentParser, policies: str, seeds: str) -> None:
    """Add which policies are compared, on how many pictures each; both texts tell what holds when left out."""
    command.add_argument(
        "--policies",
        metavar="all|A,B:NAME=X,…",
        help=f"policies, each with settings of its own if need be, such as k-lora:scale=s*,direct ({policies})",
    )
    command.add_argument("--seeds", type=whole(1), metavar="N", help=f"pictures, each with the next seed ({seeds})")


def add_settings(
    command: argparse.ArgumentParser,
    renamed: Mapping[str, str] = AS_THEY_ARE,
    explained: Mapping[str, str] = AS_THEY_ARE,
    without: Sequence[str] = (),
) -> None:
    """Add an option for every setting, first those of all policies, then those that some policies alone heed."""
    common = command.add_argument_group("settings of the fusion")
    own = command.add_argument_group("settings of single policies")
    for name, option in options().items():
        if name in without:
            continue
        policies = policies_with(name)
        # A percent sign would be argparse's.
        text = explained.get(name, option.help)
        if f"{AUTO}:" not in text and (default := _default(name)):
            text = f"{text} ({default})"
        text = text.replace("%", "%%")
        (own if policies else common).add_argument(
            "--" + renamed.get(name, name).replace("_", "-"),
            dest=PREFIX + name,
            metavar=_metavar(name, option),
            help=argparse.SUPPRESS if option.hidden else f"{', '.join(policies)}: {text}" if policies else text,
        )


def _metavar(name: str, option: Option) -> str:
    if name == "policy":
        return "NAME"
    return "|".join(option.choices) if option.choices else "N" if option.kind is int else "X"


def _default(name: str) -> str:
    value = getattr(Settings(), name)
    if name == "policy":
        return f"{value}; {', '.join(other for other in POLICIES if other != value)}"
    return AUTO if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def read_settings(args: argparse.Namespace, renamed: Mapping[str, str] = AS_THEY_ARE) -> Settings:
    """Make settings of the options given; KloraError naming the option, also where settings do not fit together."""
    start = len(PREFIX)
    given = {key[start:]: value for key, value in vars(args).items() if key.startswith(PREFIX) and value is not None}
    if {"balance", "share"} <= given.keys():
        raise KloraError("--share: not allowed with --balance; the share decides the balance")
    try:
        settings = Settings.parse(given)
        make_policy(resolve(settings, None))
    except SettingsError as error:
        flag = renamed.get(error.field, error.field).replace("_", "-")
        raise KloraError(f"--{flag}: {error.reason}") from None
    return settings


def read_request(args: argparse.Namespace, settings: Settings) -> GenerationRequest:
    """Make a request of the options that all commands share which make pictures."""
    return GenerationRequest(
        model=args.model,
        subject=getattr(args, "subject", None) or (),
        style=getattr(args, "style", None) or (),
        prompt=args.prompt or "",
        negative_prompt=args.negative_prompt,
        seed=args.seed,
        size=args.size,
        guidance=args.guidance,
        out=Path(args.out),
        device=args.device,
        dtype=args.dtype,
        settings=settings,
    )


def add_pair(command: argparse.ArgumentParser) -> None:
    """Add the two files of a command that takes little else, or both sides by name where one has several files."""
    command.add_argument("files", nargs="*", metavar="SUBJECT STYLE", help="the .safetensors files of both")
    add_sides(command, "or the files of the {}, each with :WEIGHT if that is not 1, such as coat.safetensors:0.5")


def add_sides(command: argparse.ArgumentParser, text: str, required: bool = False) -> None:
    """Add an option for each side; {} in `text` stands for its name."""
    for side in SIDES:
        command.add_argument(f"--{side}", nargs="+", metavar="FILE[:W]", required=required, help=text.format(side))


def read_pair(args: argparse.Namespace) -> None:
    """Put (path, weight) of both sides' files where `add_sides` has them; KloraError where one is missing."""
    if args.files and (args.subject or args.style):
        raise KloraError(f"{args.files[0]}: give both sides as --subject and --style, or neither")
    if len(args.files) > 2:
        raise KloraError(f"{args.files[2]}: is one file too many; several of a side follow --subject or --style")
    args.subject, args.style = args.subject or args.files[:1], args.style or args.files[1:]
    for side in SIDES:
        if not getattr(args, side):
            raise KloraError(f"{side.upper()}: is needed; see --help")
    read_sides(args)


def read_sides(args: argparse.Namespace) -> None:
    """Make (path, weight) of what the options of both sides name; KloraError for a side of nothing or a bad weight."""
    for side in SIDES:
        if not getattr(args, side):
            raise KloraError(f"--{side}: is needed; see --help")
        setattr(args, side, tuple(read_weight(text, side) for text in getattr(args, side)))


def stems(files: Sequence[tuple[str, float]]) -> str:
    """The names of a side's files for people."""
    return " and ".join(printable(Path(path).stem) for path, _ in files)


def side_paths(args: argparse.Namespace) -> list[str]:
    """The files of both sides."""
    return [path for side in SIDES for path, _ in getattr(args, side)]


def check_loras(args: argparse.Namespace) -> None:
    """Raise LoraFileError for the first file that is not there, in an instant: before anything slow is imported."""
    for path in side_paths(args):
        check_readable(Path(path))


def read_weight(text: str, side: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT of a side; KloraError for a bad weight."""
    try:
        return split_weight(text, side)
    except SettingsError as error:
        raise KloraError(f"--{side}: {text}: {error.reason}") from None


def demand(args: argparse.Namespace, *names: str) -> None:
    """Raise KloraError for the first option of `names` that is not given, where `--demo` would have filled it in."""
    for name in names:
        if getattr(args, name) is None:
            option = "FOLDER" if name == "study" else f"--{name}"
            raise KloraError(f"{option}: is needed, or --demo; see --help")


def whole(low: int) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from `low`."""

    def read(text: str) -> int:
        if not text.strip().isdecimal() or not low <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return int(text)

    return read


def finite(text: str) -> float:
    """The type of an option that takes a finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number


def size(text: str) -> tuple[int, int]:
    """The type of an option that takes a picture's (width, height)."""
    width, by, height = text.lower().partition("x")
    sides = width, height if by else width
    if not all(side.isdecimal() and len(side) < 6 and int(side) % 8 == 0 and 8 <= int(side) <= 16384 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give N or WxH in pixels, multiples of 8")
    return int(sides[0]), int(sides[1])
