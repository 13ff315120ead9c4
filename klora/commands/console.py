"""What a command says beside its results, on stderr, and how it ends."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from klora.errors import KloraError
from klora.text import one_line

if TYPE_CHECKING:
    from tqdm import tqdm

BAD, INTERRUPTED = 2, 130


def warn(text: str) -> None:
    """Write one line to stderr."""
    print(f"klora: warning: {one_line(text)}", file=sys.stderr, flush=True)


def fail(text: str, code: int) -> int:
    """Write why a command ends, on one line to stderr; returns the exit code."""
    print(f"klora: error: {one_line(text)}" if code == BAD else f"klora: {text}", file=sys.stderr, flush=True)
    return code


def need(what: str, *modules: str) -> None:
    """Raise KloraError, saying what to install, where an optional package that `what` needs is missing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise KloraError(f'{what} needs {module}; pip install "klora[demo]"')


def scoring_bar(doing: str = "scoring new files") -> Callable[[int, int], None]:
    """Bars on the terminal for the modules of pairs that are being scored; each appears with its first module."""
    bars: list[tqdm] = []

    def advance(done: int, total: int) -> None:
        from tqdm import tqdm

        if not bars:
            bars.append(tqdm(total=total, desc=doing, unit="module", leave=False, disable=None))
        bars[0].update(done - bars[0].n)
        if done == total:
            bars.pop().close()

    return advance


def never_fail_on_a_character(stream: TextIO) -> None:
    """Let a terminal that knows no γ, or a file name that is not text, cost a question mark and not the command."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def settle(stream: TextIO) -> None:
    """Send what a broken stdout cannot take nowhere, or Python would complain when it exits."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
