"""Text from files, users and libraries, made fit for one line of a message."""

from __future__ import annotations

_LONGEST = 300


def printable(text: str) -> str:
    """`text` without control characters, which are escaped, and not too long."""
    return _escaped(text if len(text) <= _LONGEST else f"{text[:200]}…{text[-80:]}")


def one_line(text: str) -> str:
    """All of `text` on one line, without control characters; what is in a line, such as a path, stays as it is."""
    return _escaped(" ".join(filter(None, map(str.strip, text.splitlines()))))


def count_of(number: float, noun: str) -> str:
    """A number with its noun, as in: 1 key, 2160 keys, 1.67 forwards."""
    return f"{number if isinstance(number, int) else f'{number:.3g}'} {noun}{'' if number == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, which is enough for a message of ours."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= 200 else f"{line[:199]}…"


def _escaped(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
