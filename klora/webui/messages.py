"""What is said under an image, in the console and in the image's text."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from klora.errors import KloraError, by_name

if TYPE_CHECKING:
    from klora.fusion.scores import OnScored
    from klora.pair import Pair

logger = logging.getLogger("klora")
_PREFIX = "K-LoRA: "
ERROR = "K-LoRA error"
"""The key of a picture's text that says why K-LoRA did not run, or not to the end."""
NOTE = "K-LoRA note"
"""The key that says what in the prompts does nothing."""


def comment(p: Any, text: str) -> None:
    """Say something under the image and in the console."""
    text = f"{_PREFIX}{text}"
    logger.warning(text)
    p.comment(text)


def hand_on_comments(p: Any, processed: Any) -> None:
    """Have what was said shown under the image.

    SD.Next hands on no comments of a processing object by itself, and the others none that come after sampling.
    """
    shown = str(getattr(processed, "comments", None) or "")
    unsaid = [text for text in getattr(p, "comments", ()) if text.startswith(_PREFIX) and text not in shown]
    if unsaid:
        processed.comments = "\n".join([*filter(None, [shown.rstrip("\n")]), *unsaid])


def note(p: Any, text: str) -> None:
    """Say something under the image, in the console and in the image's text."""
    comment(p, text)
    p.extra_generation_params[NOTE] = text.replace("\n", " ")


def fail(p: Any, reason: str, outcome: str = "not applied") -> None:
    """Say under the image, in the console and in the image's text why K-LoRA did not run, or not to the end."""
    comment(p, f"{outcome}: {reason}")
    p.extra_generation_params[ERROR] = reason.replace("\n", " ")


def without_effect(pair: Pair, left_out: Sequence[str]) -> list[str]:
    """What of a pair's files does nothing, by their names: modules of rank 0, and what is `left_out` of the model."""
    from klora.lora.coverage import idle

    paths = [lora.path for lora in pair.loras if lora.path]
    return [by_name(text, *paths) for text in (*idle(pair.loras), *left_out)]


@contextmanager
def scoring_shown(*names: str) -> Iterator[OnScored]:
    """Tell by the page's progress bar how far the scoring of new files is, and in the console that it takes a while."""
    state = importlib.import_module("modules.shared").state
    before, told = getattr(state, "textinfo", None), False

    def show(done: int, total: int) -> None:
        nonlocal told
        if not told:
            logger.info("K-LoRA: scoring %s, which is needed once for each file", " and ".join(names))
        told = True
        state.textinfo = f"K-LoRA: scored {done} of {total} modules"

    try:
        yield show
    finally:
        state.textinfo = before


def reason_of(error: Exception) -> str:
    """What an error says to a user; one that is not meant for users goes to the console as a whole."""
    if isinstance(error, KloraError):
        return str(error)
    logger.error("K-LoRA failed", exc_info=error)
    # The text of an error of the file system would tell where a file lies on this machine.
    return f"an unexpected {type(error).__name__}: {getattr(error, 'strerror', None) or error}"
