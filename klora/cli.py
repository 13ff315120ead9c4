"""The command line: assembles the commands of `klora.commands`, runs one, and gives its exit code.

Results go to stdout, everything else to stderr. Exit code 0; 2 for bad arguments or bad input, with one line on
stderr; 130 when interrupted. A command is imported when it is called, so that `klora --help` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from klora import __version__
from klora.commands.console import BAD, INTERRUPTED, fail, never_fail_on_a_character, settle, warn
from klora.errors import KloraError, LeftOutWarning, SettingsError

COMMANDS = {
    "analyze": "say which LoRA would act in which module at which step",
    "generate": "make pictures with a diffusers pipeline",
    "balance": "find the share of subject and style that a pair should have, by its own LoRAs",
    "compare": "fuse one pair by several policies, on one contact sheet",
    "evaluate": "score policies on your own subjects and styles, as in K-LoRA's Table 1",
    "merge": "write a fusion that is the same at every step as one LoRA file",
    "measure-discrepancy": "measure EST-LoRA's discrepancy of a pair, from one picture of each LoRA",
    "demo": "fuse the LoRAs that come with the project; no download, no GPU",
}
"""What each command does. `klora.commands.NAME`, with _ for -, has `USAGE`, `add_options(parser)` and `run(args)`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; never raises for anything a user can cause."""
    never_fail_on_a_character(sys.stdout)
    # The commands say it in their own words, where they say what is to be known of a fusion.
    warnings.filterwarnings("ignore", category=LeftOutWarning)
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has seen enough.
        settle(sys.stdout)
        return 0
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except MemoryError:
        return fail("out of memory", BAD)
    except OSError as error:
        settle(sys.stdout)
        where = f"{error.filename}: " if error.filename else ""
        return fail(f"{where}{error.strerror or error}", BAD)
    except SettingsError as error:
        return fail(f"--{error.field.replace('_', '-')}: {error.reason}", BAD)
    except KloraError as error:
        return fail(str(error), BAD)
    return code


def _run(argv: Sequence[str]) -> int:
    try:
        args = _parser(argv).parse_args(argv)
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
        args.run(args)
    # After an error, its one line is all that is said.
    for text in dict.fromkeys(pending):
        warn(text)
    return 0


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage, so that every error is one line."""

    def error(self, message: str) -> NoReturn:
        raise KloraError(f"{message}; see {self.prog} --help")


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the options of those commands that `argv` may be calling."""
    parser = _Parser(
        prog="klora",
        usage="klora [--version] COMMAND …",
        description="Fuse a subject LoRA and a style LoRA, with no training.",
        epilog="klora COMMAND --help explains one command.",
    )
    parser.add_argument("--version", action="version", version=f"klora {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands", parser_class=_Parser)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        if name in argv:
            module = importlib.import_module(f"klora.commands.{name.replace('-', '_')}")
            command.usage = f"klora {name} {module.USAGE}"
            module.add_options(command)
            command.set_defaults(run=module.run)
    return parser
