"""One analysis under way: made in a thread of its own, so that the page can tell how far it is and end it."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from klora.errors import KloraError
from klora.webui.analysis_page import failure
from klora.webui.messages import reason_of

Result = tuple[str, str]
"""What an analysis shows, and the rule with its numbers, as HTML."""

_TOLD_EVERY_S = 0.4
SCORING, COMPARING = "scoring", "comparing"
CANCELLED = "The analysis was cancelled."


class Hear(Protocol):
    """Is told how many modules are done, of how many, and what is done with them."""

    def __call__(self, done: int, total: int, doing: str = SCORING) -> None:
        """Raises CancelledError where it is to end."""


class CancelledError(KloraError):
    """Somebody has ended the analysis."""


class AnalysisRun:
    """An analysis of `names`; `make` is given what hears how far it is."""

    def __init__(self, names: str, make: Callable[[Hear], Result]) -> None:
        self._names = names
        self._make = make
        self._heard: tuple[str, int, int] | None = None
        self._result: Result = ("", "")
        self._cancelled, self._done = threading.Event(), threading.Event()

    def cancel(self) -> None:
        """End it at the next module."""
        self._cancelled.set()

    def watch(self) -> Iterator[str | Result]:
        """Make it; tell now and then how far it is, as HTML, and at last what came of it."""
        threading.Thread(target=self._run, name="K-LoRA analysis", daemon=True).start()
        while not self._done.wait(_TOLD_EVERY_S):
            yield self._progress()
        yield self._result

    def _run(self) -> None:
        try:
            self._result = self._make(self._hear)
        except Exception as error:
            self._result = failure(reason_of(error)), ""
        finally:
            self._done.set()

    def _hear(self, done: int, total: int, doing: str = SCORING) -> None:
        if self._cancelled.is_set():
            raise CancelledError(CANCELLED)
        self._heard = doing, done, total

    def _progress(self) -> str:
        if self._heard is None:
            return ""
        doing, done, total = self._heard
        names = html.escape(self._names)
        return f'<p class="klora-progress"><span>{doing}</span> <span>{names}: {done} / {total}</span></p>'
