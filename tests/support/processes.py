"""Processes beside the test's own. On Linux they are forks, which have imported everything already."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess


def start(run: Callable[..., object], *args: object, **environment: str) -> BaseProcess:
    """Call a function of a module in a process of its own, which ends with what it returns, as `sys.exit` takes it."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    process: BaseProcess = context.Process(target=_run, args=(run, args, environment))  # type: ignore[attr-defined]
    process.start()
    return process


def _run(run: Callable[..., object], args: tuple[object, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    sys.exit(run(*args))  # type: ignore[arg-type]


def end_of(process: BaseProcess, seconds: float = 120) -> int | None:
    """The exit code of a process, once it has ended; the signal that ended it, negative; None where it goes on."""
    process.join(seconds)
    return process.exitcode
