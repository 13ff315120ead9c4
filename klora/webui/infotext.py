"""Settings in an image's text, and back into the controls.

The tag in the prompt says it all; the keys say beside it what "auto" came to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from klora.errors import KloraError
from klora.fusion.policies import is_heeded
from klora.settings import Settings
from klora.webui.args import ARG_ORDER, setting_options, text_of
from klora.webui.prompt_tag import NAME, Tag, find_tag
from klora.webui.side_text import rename

PREFIX = "K-LoRA "
RESOLVED = ("scale", "alpha", "beta", "scope", "variant")
"""Settings that are always written, as what acted."""

SHARE_KEY = f"{PREFIX}subject share"
"""What came of it, for people; nothing reads it."""

_TAG = re.compile(rf"<{NAME}:([^:>]+):([^:>]+)")


def key_of(setting: str) -> str:
    """The key of a setting."""
    return PREFIX + setting.replace("_", " ")


def to_infotext(acting: Settings, given: Settings) -> dict[str, Any]:
    """Write the settings that act: of the resolved ones what always matters, of the `given` what is not the default.

    What the policy in force does not heed is left out.
    """
    values = {**given.changed(), "policy": acting.policy, **{name: getattr(acting, name) for name in RESOLVED}}
    if acting.policy == Settings().policy:
        del values["policy"]
    return {
        key_of(name): _text(values[name])
        for name in setting_options()
        if name in values and is_heeded(name, acting.policy)
    }


def share_text(share: float) -> str:
    """Write the reached fraction of decisions for the subject."""
    return f"{share:.1%}"


def from_infotext(params: Mapping[str, Any]) -> dict[str, Any]:
    """Read the arguments back, typed, by name; nothing where the prompt holds no good tag.

    They are those of the tag: what was "auto" stays so, and is not what it came to for the model of that picture.
    """
    tag = tag_of(params)
    if tag is None:
        return {}
    values: dict[str, Any] = {"subject": tag.subject, "style": tag.style}
    values.update({name: getattr(tag.settings, name) for name in setting_options()})
    return values


def tag_of(params: Mapping[str, Any]) -> Tag | None:
    """The tag of a pasted prompt."""
    try:
        return find_tag(str(params.get("Prompt") or ""))
    except KloraError:
        return None


def _paste(name: str, params: Mapping[str, Any]) -> Any:
    values = from_infotext(params)
    return text_of(values[name]) if name in values else None


def _paste_enabled(params: Mapping[str, Any]) -> bool | None:
    """The pasted tag asks for the fusion; ticked as well, the accordion would be of no use, and wrong later on."""
    return False if f"<{NAME}:" in str(params.get("Prompt") or "") else None


PASTERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "enabled": _paste_enabled,
    **{name: partial(_paste, name) for name in ARG_ORDER if name not in ("enabled", "show_map")},
}
"""What each control is set to when a text is pasted, None for no change."""


def hashes_of(params: Mapping[str, Any]) -> dict[str, str]:
    """Read "Lora hashes" as {name: hash}."""
    pairs = (item.rpartition(":") for item in str(params.get("Lora hashes") or "").split(","))
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


def rename_by_hash(params: dict[str, Any], name_for: Callable[[str, str], str | None]) -> None:
    """Rename LoRAs in pasted tags whose files have other names here.

    `name_for` gives the name here for a name there and its hash, None to keep it.
    """
    hashes = hashes_of(params)
    if not hashes:
        return

    def here(name: str) -> str | None:
        # The host leaves out commas in this list, and colons are left out too.
        value = hashes.get(name.replace(",", "").replace(":", ""))
        return name_for(name, value) if value else None

    for key in ("Prompt", "Hires prompt"):
        if isinstance(params.get(key), str):
            params[key] = _TAG.sub(
                lambda m: f"<{NAME}:{rename(m.group(1), here)}:{rename(m.group(2), here)}", params[key]
            )


def _text(value: Any) -> Any:
    # The host writes what str gives, and repr is the shortest text that reads back as the same number.
    return repr(value).removesuffix(".0") if isinstance(value, float) else value
