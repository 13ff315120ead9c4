"""Axes of the X/Y/Z plot. An axis leaves its value on the processing object, and the script writes it into the tag."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any

from klora.errors import KloraError
from klora.hosts.webui.lora_library import Library
from klora.settings import Option
from klora.webui.args import choices_of, setting_options
from klora.webui.injection import OVERRIDES

PREFIX = "[K-LoRA] "
SETTINGS = ("balance", "alpha", "beta", "scale", "policy", "subject_strength", "style_strength", "scope")
# Other files to open, and other text to encode, but no other checkpoint.
_PAIR_COST = 0.4


def add_axes() -> None:
    """Add the axes; called by the host before it builds its UI, on every Reload UI again."""
    for module in plots():
        present = {option.label for option in module.axis_options}
        module.axis_options.extend(axis for axis in _axes(module) if axis.label not in present)


def plots() -> Iterator[Any]:
    """Find the host's X/Y/Z plot among its scripts."""
    scripts = importlib.import_module("modules.scripts").scripts_data
    found = {id(data.module): data.module for data in scripts if PurePath(str(data.path)).name == "xyz_grid.py"}
    yield from (module for module in found.values() if hasattr(module, "axis_options"))


def _axes(module: Any) -> Iterable[Any]:
    for side in ("subject", "style"):
        yield module.AxisOption(
            f"{PREFIX}{side.capitalize()}", str, _apply(side), confirm=_confirm_names, cost=_PAIR_COST, choices=_names
        )
    for name in SETTINGS:
        option = setting_options()[name]
        choices = choices_of(name, option)
        yield module.AxisOption(
            PREFIX + option.label,
            option.kind,
            _apply(name),
            confirm=_confirm(name, option),
            cost=0.0,
            choices=(lambda found=choices: list(found)) if choices else None,
        )


def _apply(name: str) -> Callable[[Any, Any, Any], None]:
    def apply(p: Any, value: Any, _values: Any) -> None:
        # A cell's `p` is a shallow copy: what is on it is shared with the other cells.
        setattr(p, OVERRIDES, {**(getattr(p, OVERRIDES, None) or {}), name: value})

    return apply


def _confirm(name: str, option: Option) -> Callable[[Any, list[Any]], None]:
    def confirm(_p: Any, values: list[Any]) -> None:
        for value in values:
            read = option.read(name, value)
            choices = choices_of(name, option)
            if choices and read not in choices:
                raise KloraError(f"{name}: {value!r} is not one of {', '.join(choices)}")

    return confirm


def _names() -> list[str]:
    return Library().names()


def _confirm_names(_p: Any, values: list[Any]) -> None:
    for value in values:
        Library().find(value)
