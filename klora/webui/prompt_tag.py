"""The tag `<klora:subject:style>` in a prompt: the one truth about a fusion that everything downstream reads.

`<klora:dog:ink:0.9:1.1:scale=s*:beta=0.6>`: two names, the strengths of subject and style if they are not 1, then
any setting by name. The host splits a tag at its colons and hands over the pieces. Signs of the tag's own in a name are
written as in URLs, %3A for a colon; the names stay as they are written, for they may be sides of several LoRAs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from klora.errors import KloraError, SettingsError
from klora.settings import Settings, options

NAME = "klora"
STRENGTHS = ("subject_strength", "style_strength")
_TAG = re.compile(rf"<{NAME}:([^>]+)>")
_FREE = frozenset(name for name, option in options().items() if option.free)
"""Settings whose text may hold signs of the tag's own, written as in URLs like those of names."""


@dataclass(frozen=True)
class Tag:
    """A pair of LoRA names with the settings of their fusion."""

    subject: str
    style: str
    settings: Settings

    @classmethod
    def parse(cls, items: Sequence[str]) -> Tag:
        """Read the pieces of a tag; KloraError that quotes the tag and names the fault."""
        quoted = f"<{':'.join((NAME, *items))}>"
        try:
            return cls._parse(items)
        except KloraError as error:
            raise KloraError(f"{quoted}: {error}") from None

    @classmethod
    def _parse(cls, items: Sequence[str]) -> Tag:
        names = [item.strip() for item in items[:2]]
        if len(names) < 2 or not all(names) or any(set("=:") & set(name) for name in names):
            raise KloraError(f"it must name a subject and a style, as in <{NAME}:subject:style>")
        values: dict[str, Any] = {}
        strengths = list(STRENGTHS)
        for item in items[2:]:
            name, equals, value = item.partition("=")
            name = name.strip().replace("-", "_")
            if not equals:
                if not strengths:
                    raise KloraError(f"{item!r} is one number too many; after two strengths, write name=value")
                name, value = strengths.pop(0), item
            if name in values:
                raise SettingsError(name, "is given twice")
            values[name] = unquote(value) if name in _FREE else value
        return cls(names[0], names[1], Settings.parse(values))

    def __str__(self) -> str:
        """Write the tag, with what differs from the defaults."""
        changed = self.settings.changed()
        strengths = [_text(changed.pop(name, 1.0)) for name in STRENGTHS]
        while strengths and strengths[-1] == "1":
            strengths.pop()
        named = [f"{name}={_quoted(value) if name in _FREE else _text(value)}" for name, value in changed.items()]
        return f"<{':'.join((NAME, self.subject, self.style, *strengths, *named))}>"


def find_tag(prompt: str) -> Tag | None:
    """The first tag of a prompt, None where there is none; KloraError for a bad one."""
    found = _TAG.search(prompt)
    return Tag.parse(found.group(1).split(":")) if found else None


def _text(value: Any) -> str:
    # repr is the shortest text that reads back as the same number.
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def quoted_name(name: str) -> str:
    """Write a LoRA's name so that it can stand in a tag."""
    return _without("[:<>=\r\n]", name)


def _quoted(text: str) -> str:
    return _without("[%:<>()\\[\\]|,]", text)


def _without(signs: str, text: str) -> str:
    return re.sub(signs, lambda sign: f"%{ord(sign[0]):02X}", text)
