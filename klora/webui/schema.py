"""The arguments as a JSON Schema, for whoever calls the API."""

from __future__ import annotations

from typing import Any

from klora.settings import AUTO, Option, Settings
from klora.webui.args import ARG_ORDER, choices_of, setting_options, text_of

_TYPES = {int: "integer", float: "number", str: "string"}


def json_schema() -> dict[str, Any]:
    """Describe the one object that `alwayson_scripts` takes; its properties are in the positional order."""
    own = {
        "enabled": {"type": "boolean", "title": "Enable K-LoRA", "description": "true where any other is given"},
        "subject": {"type": "string", "title": "Subject LoRA", "description": "a name or alias, as <lora:…> takes it"},
        "style": {"type": "string", "title": "Style LoRA", "description": "a name or alias, as <lora:…> takes it"},
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
