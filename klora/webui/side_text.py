"""A side of a fusion as text, `dog*0.8 + coat*0.5`: names of LoRAs, each with its weight if that is not 1.

A text that is a name as it stands means that one. In any other, a name that holds signs of this notation or of the
tag's is written as in URLs: %2B for a plus, %2A for an asterisk, %3A for a colon.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import unquote

from klora.errors import KloraError, SettingsError
from klora.lora.weighted import check_weight, weighted_name
from klora.webui.prompt_tag import quoted_name

_SIGNS = re.compile("[%+*:<>=()\\[\\]|,\\r\\n]")


def split_side(text: str, side: str) -> list[tuple[str, float]]:
    """The names of a text and their weights; KloraError where one is missing, SettingsError for a bad weight."""
    return [_part(part.strip(), text, side) for part in text.split("+")]


def parts_of(text: str, side: str, knows: Callable[[str], bool]) -> list[tuple[str, float]]:
    """The same where a text that `knows` takes for a name means that one."""
    # In a tag, a colon of a name is written as in URLs, also where the name is all there is.
    whole = next((name for name in (text, unquote(text)) if knows(name)), None)
    return split_side(text, side) if whole is None else [(whole, 1.0)]


def join_side(parts: Iterable[tuple[str, float]]) -> str:
    """Write names with their weights."""
    return " + ".join(weighted_name(quoted(name), weight) for name, weight in parts)


def quoted(name: str) -> str:
    """A name with the signs of the notation as in URLs."""
    return _SIGNS.sub(lambda sign: f"%{ord(sign[0]):02X}", name)


def side_of_json(side: str, value: list[Any]) -> str:
    """Write a list of names, or of {"name", "weight"}; SettingsError for anything else."""
    parts = []
    for one in value:
        name, weight = (one.get("name"), one.get("weight", 1)) if isinstance(one, Mapping) else (one, 1)
        unknown = set(one) - {"name", "weight"} if isinstance(one, Mapping) else set()
        if not isinstance(name, str) or not name.strip() or unknown:
            raise SettingsError(side, f'{one!r} is not the name of a LoRA, nor {{"name": …, "weight": …}}')
        parts.append((name.strip(), check_weight(weight, side)))
    if not parts:
        raise SettingsError(side, "is an empty list; name a LoRA")
    return join_side(parts)


def rename(text: str, here: Callable[[str], str | None]) -> str:
    """The text with names as `here` gives them, None to keep one; a text that is such a name counts as one."""
    name = unquote(text.strip())
    if (whole := here(name)) is not None:
        return quoted_name(whole)
    try:
        parts = split_side(text, "side")
    except KloraError:
        return text
    if parts == [(name, 1.0)]:
        return text
    found = [(here(name), name, weight) for name, weight in parts]
    if all(name is None for name, *_ in found):
        return text
    return join_side((name or before, weight) for name, before, weight in found)


def _part(part: str, text: str, side: str) -> tuple[str, float]:
    name, star, weight = part.rpartition("*")
    if not star:
        name, weight = part, "1"
    name = unquote(name.strip())
    if not name:
        raise KloraError(f"{text!r} names no LoRA before or after a sign; write a + or * of a name as %2B or %2A")
    return name, check_weight(weight.strip(), side)
