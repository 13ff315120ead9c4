"""What the accordion and the API hand over: one object, or values in an order that is only ever appended to."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klora.errors import SettingsError
from klora.fusion.policies import POLICIES, make_policy, resolve
from klora.settings import AUTO, Option, Settings, options
from klora.webui.prompt_tag import Tag, quoted_name
from klora.webui.side_text import side_of_json

_FIRST = (
    "enabled",
    "subject",
    "style",
    "subject_strength",
    "style_strength",
    "balance",
    "share",
    "policy",
    "variant",
    "scale",
    "alpha",
    "beta",
    "k",
    "gamma",
    "scope",
    "other_layers",
    "text_encoder",
    "unpaired",
    "progress",
    "passes",
    "engine",
    "seed",
    "show_map",
)
NOT_OURS = ("steps", "clip_model", "dino_model")
"""Settings that a WebUI decides by itself."""

ARG_ORDER = (*_FIRST, *(name for name in options() if name not in (*_FIRST, *NOT_OURS)))
"""The positional order of the arguments. Callers rely on it: a new setting comes last."""

SIDES = ("subject", "style")

NONE = "None"
"""What a menu of LoRAs says where none is chosen."""

_NOT_CHOSEN = (None, "", NONE)
_TYPES = {int: "integer", float: "number", str: "string"}


class NotChosenError(SettingsError):
    """A menu of LoRAs says "None"."""

    def __init__(self, side: str) -> None:
        super().__init__(side, f"Choose a {side} LoRA")

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class FusionRequest:
    """A pair of LoRA names and the settings of their fusion; `show_map`: the selection map is wanted too."""

    subject: str
    style: str
    settings: Settings
    show_map: bool = False

    @property
    def tag(self) -> Tag:
        """The tag that asks for the same."""
        return Tag(self.subject, self.style, self.settings)


def setting_options() -> dict[str, Option]:
    """Describe the settings that a WebUI's user can make, by name, in the order of the arguments."""
    known = options()
    return {name: known[name] for name in ARG_ORDER if name in known}


def choices_of(name: str, option: Option) -> tuple[str, ...]:
    """List what a setting may be here, where it is one of few words."""
    return tuple(POLICIES) if name == "policy" else option.choices


def text_of(value: Any) -> Any:
    """A setting's value as a control and JSON write it: what K-LoRA chooses is "auto"."""
    return "auto" if value is None else value


def read_args(args: Sequence[Any], overrides: Mapping[str, Any] | None = None) -> FusionRequest | None:
    """Make a request of `args`, None where K-LoRA is not asked for, or has no pair yet.

    `args` hold one object, or values in ARG_ORDER; what is missing or None has its default, but an object that holds
    anything and does not say "enabled" is meant, and must name its pair. `overrides` count more than `args`. Raises
    SettingsError.
    """
    values = named(args)
    if overrides and {*SIDES} <= overrides.keys():
        values["enabled"] = True
    if not truth("enabled", values.pop("enabled", False)):
        return None
    values = override(values, overrides or {})
    by_place = not (args and isinstance(args[0], Mapping))
    if by_place and any(values.get(side) in _NOT_CHOSEN for side in SIDES):
        return None
    return read_values(values)


def read_values(values: Mapping[str, Any]) -> FusionRequest:
    """Make a request of values by name, "enabled" not among them; SettingsError for any that is unknown or bad."""
    values = {check_name(name): value for name, value in values.items() if value is not None}
    show_map = truth("show_map", values.pop("show_map", False))
    subject, style = (lora_name(side, values.pop(side, None)) for side in SIDES)
    return FusionRequest(subject, style, _settings(values), show_map)


def asks_for_more(args: Sequence[Any]) -> bool:
    """Whether `args` ask for more than the map; a pair need not be chosen. SettingsError for bad ones."""
    values = named(args)
    if not truth("enabled", values.pop("enabled", False)):
        return False
    truth("show_map", values.pop("show_map", False))
    more = bool(values)
    for side in SIDES:
        if (name := values.pop(side, None)) not in _NOT_CHOSEN:
            lora_name(side, name)
    _settings(values)
    return more


def _settings(values: Mapping[str, Any]) -> Settings:
    settings = Settings.parse(values)
    make_policy(resolve(settings, None))
    return settings


def named(args: Sequence[Any]) -> dict[str, Any]:
    """`args` by name, without those that are None; SettingsError for what is no argument."""
    if args and isinstance(args[0], Mapping):
        # The host fills up with the controls' defaults.
        given = {check_name(name): value for name, value in args[0].items() if value is not None}
        return {"enabled": bool(given), **given}
    if len(args) > len(ARG_ORDER):
        raise SettingsError("args", f"{len(args)} values are too many; the order is {', '.join(ARG_ORDER)}")
    return {name: value for name, value in zip(ARG_ORDER, args, strict=False) if value is not None}


def override(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Put `overrides` over `values`; a balance is no balance where a share decides it."""
    merged = {**values, **overrides}
    if "balance" in overrides and "share" not in overrides:
        merged.pop("share", None)
    return merged


def override_tag(tag: Tag, overrides: Mapping[str, Any]) -> Tag:
    """The tag with `overrides`; SettingsError for a bad one."""
    values = {name: value for name, value in tag.settings.to_dict().items() if name not in NOT_OURS}
    return read_values(override({"subject": tag.subject, "style": tag.style, **values}, overrides)).tag


def check_name(name: Any) -> str:
    """An argument's name as ours, dashes or not; SettingsError for an unknown one."""
    found = name.replace("-", "_") if isinstance(name, str) else ""
    if found not in ARG_ORDER:
        near = difflib.get_close_matches(found, ARG_ORDER, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(ARG_ORDER)}"
        raise SettingsError(name if found.isidentifier() else repr(name), f"unknown setting; {hint}")
    return found


def truth(name: str, value: Any) -> bool:
    """Read yes or no; SettingsError for anything else."""
    text = value.strip().lower() if isinstance(value, str) else value
    # 0 and 1 are equal to these.
    for answer, spellings in (
        (True, (True, "true", "yes", "on", "1")),
        (False, (False, "false", "no", "off", "0", "")),
    ):
        if isinstance(text, (bool, int, float, str)) and text in spellings:
            return answer
    raise SettingsError(name, f"{value!r} is not true or false")


def lora_name(side: str, value: Any) -> str:
    """Read the name of a LoRA, or the text of several (klora.webui.side_text), or a list of names and weights.

    What comes is as it can stand in a tag; SettingsError for none.
    """
    if isinstance(value, list):
        return side_of_json(side, value)
    name = value.strip() if isinstance(value, str) else value
    if name in _NOT_CHOSEN:
        raise NotChosenError(side)
    if not isinstance(name, str):
        raise SettingsError(side, f"{value!r} is not the name of a LoRA")
    return quoted_name(name)


_SIDE = {
    "description": "a name or alias, as <lora:…> takes it; or several, as in dog*0.8 + coat*0.5, or as a list",
    "type": ["string", "array"],
    "items": {
        "type": ["string", "object"],
        "properties": {"name": {"type": "string"}, "weight": {"type": "number"}},
        "required": ["name"],
        "additionalProperties": False,
    },
}


def json_schema() -> dict[str, Any]:
    """Describe the one object that `alwayson_scripts` takes; its properties are in the positional order."""
    own = {
        "enabled": {"type": "boolean", "title": "Enable K-LoRA", "description": "true where any other is given"},
        "subject": {"title": "Subject LoRA", **_SIDE},
        "style": {"title": "Style LoRA", **_SIDE},
        "show_map": {"type": "boolean", "title": "Selection map in the gallery", "default": False},
    }
    described = {name: describe(name, option) for name, option in setting_options().items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "K-LoRA",
        "type": "object",
        "properties": {name: own.get(name) or described[name] for name in ARG_ORDER},
        "required": ["subject", "style"],
        "additionalProperties": False,
    }


def describe(name: str, option: Option) -> dict[str, Any]:
    """Describe one setting; the limits of a number do not touch the word "auto"."""
    kind = _TYPES[option.kind]
    found: dict[str, Any] = {"type": kind, "title": option.label, "description": option.help}
    if option.optional:
        found.update(type=[kind, "string", "null"], pattern=f"^{AUTO}$")
    if choices := choices_of(name, option):
        found["enum"] = list(choices)
    limits = {"minimum": option.low, "maximum": option.high, "exclusiveMinimum": option.above}
    found.update({key: limit for key, limit in limits.items() if limit is not None})
    found["default"] = text_of(getattr(Settings(), name))
    return found
