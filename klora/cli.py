"""The command line: `klora analyze`, `klora generate`, `klora compare`, `klora evaluate`, `klora demo`.

Results go to stdout, everything else to stderr. Exit code 0; 2 for bad arguments or bad input, with one line on
stderr; 130 when interrupted. What a command needs is imported when it runs, so that `klora --help` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from klora import __version__
from klora.errors import KloraError, SettingsError
from klora.fusion.policies import POLICIES, make_policy
from klora.report.files import OutputFile, output_folder, png_bytes
from klora.settings import AUTO, Option, Settings, options

if TYPE_CHECKING:
    from klora.evaluate.run import Evaluation
    from klora.generate import Request
    from klora.methods import Method

BAD, INTERRUPTED = 2, 130
_SETTING = "setting_"
_AS_THEY_ARE: Mapping[str, str] = MappingProxyType({})
_RENAMED: Mapping[str, str] = MappingProxyType({"seed": "selection-seed"})
"""Settings whose plain name means something else where pictures are made: there, `--seed` is the picture's."""
_MODEL = "a diffusers folder, or a hub id"
CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dino-vits16"
"""The models of the scores in K-LoRA's Table 1."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and give the exit code; never raises for anything a user can cause."""
    _never_fail_on_a_character(sys.stdout)
    try:
        code = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has seen enough.
        _settle(sys.stdout)
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except MemoryError:
        return _fail("out of memory", BAD)
    except OSError as error:
        _settle(sys.stdout)
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", BAD)
    except KloraError as error:
        return _fail(str(error), BAD)
    return code


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _parser().parse_args(argv)
    except SystemExit as leave:  # --help and --version
        return int(leave.code or 0)
    pending: list[str] = []
    with warnings.catch_warnings():
        # Libraries warn their users, the programmers; what klora warns of is for whoever runs the command.
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", module="klora")
        # A sign that the picture's font lacks is seen as a box there.
        warnings.filterwarnings("ignore", message="Glyph")
        warnings.showwarning = lambda message, *_args, **_kwargs: pending.append(str(message))
        args.command(args)
    # After an error, its one line is all that is said.
    for text in dict.fromkeys(pending):
        warn(text)
    return 0


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage, so that every error is one line."""

    def error(self, message: str) -> NoReturn:
        raise KloraError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="klora", description="Fuse a subject LoRA and a style LoRA, with no training.")
    parser.add_argument("--version", action="version", version=f"klora {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_analyze(commands)
    _add_generate(commands)
    _add_compare(commands)
    _add_evaluate(commands)
    _add_demo(commands)
    return parser


def _add_command(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(command=run)
    return command


def _add_analyze(commands: Any) -> None:
    command = _add_command(commands, "analyze", "say which LoRA would act in which module at which step", analyze)
    command.add_argument("subject", metavar="SUBJECT", help="the subject's .safetensors file")
    command.add_argument("style", metavar="STYLE", help="the style's .safetensors file")
    command.add_argument(
        "--json", metavar="FILE", help="write everything as JSON; - for stdout, and nothing else there"
    )
    command.add_argument("--picture", metavar="FILE.png", help="draw the selection map and the ρ of every module")
    _add_settings(command)


def _add_generate(commands: Any) -> None:
    command = _add_command(commands, "generate", "make pictures with a diffusers pipeline", generate)
    command.add_argument("--model", required=True, metavar="FOLDER|ID", help=_MODEL)
    command.add_argument("--subject", required=True, metavar="FILE", help="the subject's .safetensors file")
    command.add_argument("--style", required=True, metavar="FILE", help="the style's .safetensors file")
    command.add_argument("--prompt", required=True, metavar="TEXT", help="what to paint")
    command.add_argument(
        "--images", type=_whole(1), default=1, metavar="N", help="pictures, each with the next seed (1)"
    )
    _add_painting(command, "klora-out")
    command.add_argument("--map", action="store_true", help="draw a selection map beside the pictures")
    _add_settings(command, _RENAMED, {"steps": "sampling steps"})


def _add_painting(command: argparse.ArgumentParser, out: str) -> None:
    """Add how pictures are painted, which is the same for all commands that paint with any model."""
    command.add_argument("--negative-prompt", metavar="TEXT", help="what to avoid")
    command.add_argument("--seed", type=_whole(0), default=0, metavar="N", help="seed of the first picture (0)")
    command.add_argument("--size", type=_size, metavar="WxH|N", help="in pixels; the model's own when left out")
    command.add_argument(
        "--guidance", type=_finite, metavar="X", help="guidance scale; the pipeline's own when left out"
    )
    command.add_argument("--out", default=out, metavar="DIR", help=f"where the results go ({out})")
    command.add_argument("--device", default=AUTO, metavar="NAME", help="auto, cpu, cuda, cuda:1, mps …")
    command.add_argument("--dtype", default=AUTO, choices=(AUTO, "float32", "float16", "bfloat16"), help="of the model")


def _add_compare(commands: Any) -> None:
    command = _add_command(commands, "compare", "fuse one pair by several policies, on one contact sheet", compare)
    command.add_argument("--model", metavar="FOLDER|ID", help=_MODEL)
    command.add_argument("--subject", metavar="FILE", help="the subject's file; with --demo, one of its subjects")
    command.add_argument("--style", metavar="FILE", help="the style's file; with --demo, one of its styles")
    command.add_argument("--demo", action="store_true", help="use the model and the LoRAs that come with the project")
    command.add_argument("--prompt", metavar="TEXT", help="what to paint; made of the files' names when left out")
    _add_methods(command, "all", "4")
    _add_painting(command, "klora-compare")
    _add_settings(command, _RENAMED, {"steps": "sampling steps"}, without=("policy",))


def _add_evaluate(commands: Any) -> None:
    command = _add_command(
        commands, "evaluate", "score policies on subjects and styles of one's own, as in K-LoRA's Table 1", evaluate
    )
    command.add_argument(
        "study",
        nargs="?",
        metavar="FOLDER|FILE.json",
        help="subjects/NAME and styles/NAME, each with a LoRA and reference pictures; docs/evaluate.md",
    )
    command.add_argument("--model", metavar="FOLDER|ID", help=_MODEL)
    command.add_argument("--demo", action="store_true", help="evaluate the project's own model with its judge, offline")
    command.add_argument(
        "--prompt", metavar="TEXT", help="what to paint; {subject} and {style} stand for the words of each"
    )
    _add_methods(command, "k-lora,direct; with --demo: all", "10; with --demo: 2")
    command.add_argument("--clip", metavar="FOLDER|ID", default=CLIP, help=f"CLIP model of two of the scores ({CLIP})")
    command.add_argument("--dino", metavar="FOLDER|ID", default=DINO, help=f"DINO model of the third ({DINO})")
    _add_painting(command, "klora-evaluation")
    _add_settings(command, _RENAMED, {"steps": "sampling steps"}, without=("policy",))


def _add_methods(command: argparse.ArgumentParser, policies: str, seeds: str) -> None:
    command.add_argument(
        "--policies",
        metavar="all|A,B:NAME=X,…",
        help=f"policies, each with settings of its own if need be, such as k-lora:scale=s*,direct ({policies})",
    )
    command.add_argument("--seeds", type=_whole(1), metavar="N", help=f"pictures, each with the next seed ({seeds})")


def _add_demo(commands: Any) -> None:
    command = _add_command(commands, "demo", "fuse the LoRAs that come with the project; no download, no GPU", demo)
    command.add_argument("--out", default="klora-demo", metavar="DIR", help="where the pictures go (klora-demo)")


def _add_settings(
    command: argparse.ArgumentParser,
    renamed: Mapping[str, str] = _AS_THEY_ARE,
    explained: Mapping[str, str] = _AS_THEY_ARE,
    without: Sequence[str] = (),
) -> None:
    group = command.add_argument_group("settings of the fusion")
    for name, option in options().items():
        if name in without:
            continue
        flag = "--" + renamed.get(name, name).replace("_", "-")
        choices = _choices(name, option)
        metavar = "|".join(choices) if choices else "N" if option.kind is int else "X"
        # A percent sign would be argparse's.
        help = explained.get(name, option.help).replace("%", "%%")
        only = f"; policy {', '.join(option.policies)} only" if option.policies else ""
        group.add_argument(flag, dest=_SETTING + name, metavar=metavar, help=f"{help}{only} ({_default(name)})")


def _choices(name: str, option: Option) -> tuple[str, ...]:
    return tuple(POLICIES) if name == "policy" else option.choices


def _default(name: str) -> str:
    value = getattr(Settings(), name)
    return AUTO if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def read_settings(args: argparse.Namespace, renamed: Mapping[str, str] = _AS_THEY_ARE) -> Settings:
    """Make settings of the options given; KloraError naming the option, also where settings do not fit together."""
    prefix = len(_SETTING)
    given = {key[prefix:]: value for key, value in vars(args).items() if key.startswith(_SETTING) and value is not None}
    if {"balance", "share"} <= given.keys():
        raise KloraError("--share: not allowed with --balance; the share decides the balance")
    try:
        settings = Settings.parse(given)
        make_policy(settings.resolve(None))
    except SettingsError as error:
        flag = renamed.get(error.field, error.field).replace("_", "-")
        raise KloraError(f"--{flag}: {error.reason}") from None
    return settings


def _whole(low: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.strip().isdecimal() or not low <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return int(text)

    return read


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return number


def _size(text: str) -> tuple[int, int]:
    width, by, height = text.lower().partition("x")
    sides = width, height if by else width
    if not all(side.isdecimal() and len(side) < 6 and int(side) % 8 == 0 and 8 <= int(side) <= 16384 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give N or WxH in pixels, multiples of 8")
    return int(sides[0]), int(sides[1])


def analyze(args: argparse.Namespace) -> None:
    """Run `klora analyze`."""
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
    plan = pair.plan(settings)
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
    need("matplotlib", "--picture")
    return OutputFile.check(path, inputs)


def generate(args: argparse.Namespace) -> None:
    """Run `klora generate`."""
    settings = read_settings(args, _RENAMED)
    _need_all("klora generate", "diffusers", "transformers")
    if args.map:
        need("matplotlib", "klora generate --map")
    output_folder(args.out)

    from klora.generate import generate_pictures

    request = dataclasses.replace(_request(args, settings), images=args.images, map=args.map)
    for path in generate_pictures(request, warn):
        print(path, flush=True)


def _request(args: argparse.Namespace, settings: Settings) -> Request:
    """Make a request of the options that all painting commands share."""
    from klora.generate import Request

    return Request(
        model=args.model,
        subject=getattr(args, "subject", None) or "",
        style=getattr(args, "style", None) or "",
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


def compare(args: argparse.Namespace) -> None:
    """Run `klora compare`."""
    _need_all("klora compare", "diffusers", "transformers", "matplotlib")
    quick = _demo_pair(args) if args.demo else contextlib.nullcontext()
    _demand(args, "model", "subject", "style")
    settings = read_settings(args, _RENAMED)
    methods = _methods(args.policies or "all", settings)
    if args.prompt is None:
        args.prompt = f"a {Path(args.subject).stem} in {Path(args.style).stem} style"
        warn(f"no --prompt is given; painting “{args.prompt}”: give the words that the LoRAs were trained on")
    output_folder(args.out)

    from klora.compare import compare_pair

    request = dataclasses.replace(_request(args, settings), images=args.seeds or 4)
    with quick:
        for line in compare_pair(request, methods, warn):
            print(line, flush=True)


def evaluate(args: argparse.Namespace) -> None:
    """Run `klora evaluate`."""
    _need_all("klora evaluate", "diffusers", "transformers", "accelerate")
    quick = _demo_model(args) if args.demo else contextlib.nullcontext()
    _demand(args, "model", *([] if args.demo else ["study"]))
    settings = read_settings(args, _RENAMED)

    from klora.evaluate.run import evaluate_study

    with quick:
        for line in evaluate_study(_evaluation(args, settings)):
            print(line, flush=True)


def _evaluation(args: argparse.Namespace, settings: Settings) -> Evaluation:
    from klora.evaluate import demo
    from klora.evaluate.metrics import ClipDino
    from klora.evaluate.run import Evaluation
    from klora.evaluate.study import TEMPLATE, read_study
    from klora.generate import model_name

    methods = _methods(args.policies or (demo.METHODS if args.demo else "k-lora,direct"), settings)
    request = dataclasses.replace(_request(args, settings), images=args.seeds or (2 if args.demo else 10))
    if args.demo:
        return Evaluation(demo.TITLE, request, demo.demo_study(), methods, demo.Recognition, demo.NOTES)
    pairs = read_study(args.study, args.prompt or TEMPLATE)
    notes = (f"style similarity and CLIP score: {model_name(args.clip)}", f"DINO score: {model_name(args.dino)}")
    scorer = partial(ClipDino, args.clip, args.dino)
    return Evaluation("Evaluation", request, pairs, methods, scorer, notes)


def _methods(text: str, settings: Settings) -> list[Method]:
    from klora.methods import read_methods

    return read_methods(text, settings)


def _demand(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) is None:
            option = "FOLDER" if name == "study" else f"--{name}"
            raise KloraError(f"{option}: is needed, or --demo; see --help")


def _demo_model(args: argparse.Namespace) -> AbstractContextManager[None]:
    """Fill in the project's model, and how it paints best where the user does not say otherwise."""
    from klora.demo import run

    if args.model is not None:
        raise KloraError("--model: not allowed with --demo, which has its own")
    catalogue = run.read_catalogue(run.HOME)
    args.model = str(run.HOME / catalogue["model"])
    if args.guidance is None:
        args.guidance = catalogue["recommended"]["guidance_scale"]
    if getattr(args, f"{_SETTING}steps") is None:
        setattr(args, f"{_SETTING}steps", str(catalogue["recommended"]["steps"]))
    return run.one_thread()


def _demo_pair(args: argparse.Namespace) -> AbstractContextManager[None]:
    """Fill in the project's model and one of its pairs, the first where the user names none."""
    from klora.demo import run

    quick = _demo_model(args)
    catalogue = run.read_catalogue(run.HOME)
    names = (args.subject or next(iter(catalogue["subjects"])), args.style or next(iter(catalogue["styles"])))
    pair = run.demo_pair(catalogue, run.HOME, *names)
    args.subject, args.style = map(str, pair.files)
    args.prompt = args.prompt or pair.prompts["both"]
    return quick


def demo(args: argparse.Namespace) -> None:
    """Run `klora demo`."""
    _need_all("klora demo", "diffusers", "transformers", "matplotlib")
    folder = output_folder(args.out)

    from klora.demo.run import run_demo

    for line in run_demo(folder):
        print(line, flush=True)


def _need_all(what: str, *modules: str) -> None:
    for module in modules:
        need(module, what)


def need(module: str, what: str) -> None:
    """Raise KloraError, saying what to install, where an optional package is missing."""
    if importlib.util.find_spec(module) is None:
        raise KloraError(f'{what} needs {module}; pip install "klora[demo]"')


def warn(text: str) -> None:
    """Write one line to stderr."""
    print(f"klora: warning: {_one_line(text)}", file=sys.stderr, flush=True)


def _fail(text: str, code: int) -> int:
    print(f"klora: error: {_one_line(text)}" if code == BAD else f"klora: {text}", file=sys.stderr, flush=True)
    return code


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def _never_fail_on_a_character(stream: TextIO) -> None:
    """Let a terminal that knows no γ, or a file name that is no text, cost a question mark and not the command."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def _settle(stream: TextIO) -> None:
    """Send what a broken stdout cannot take nowhere, or Python would complain when it exits."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
