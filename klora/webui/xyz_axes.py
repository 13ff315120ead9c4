"""Axes of the X/Y/Z plot. An axis leaves its value on the processing object, and the script writes it into the tag."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any

from klora.errors import KloraError
from klora.hosts.webui.lora_library import Library
from klora.settings import Option
from klora.webui.args import choices_of, override_tag, read_args, setting_options
from klora.webui.injection import OVERRIDES
from klora.webui.judged import CELL, Cell
from klora.webui.prompt_tag import find_tag
from klora.webui.ui import TITLE

PREFIX = "[K-LoRA] "
AXES = "klora_axes"
"""Where a grid's processing object keeps the values of its axes until they have been looked at together."""
SETTINGS = (
    *("balance", "alpha", "beta", "scale", "policy", "subject_strength", "style_strength", "scope"),
    *("subject_from", "subject_to", "style_from", "style_to", "subject_blocks", "style_blocks"),
)
JUDGED = f"{PREFIX}Judged share"
"""The axis of shares whose pictures the LoRAs themselves judge."""
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
            f"{PREFIX}{side.capitalize()}",
            str,
            _apply(side),
            confirm=_confirm_names(side),
            cost=_PAIR_COST,
            choices=_names,
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

    share = _confirm("share", setting_options()["share"])
    yield module.AxisOption(JUDGED, float, _apply_judged, confirm=share, cost=0.0, choices=None)


def _refusing(function: Callable[..., None]) -> Callable[..., None]:
    """Have the host's API answer with HTTP 422 and the text of a KloraError of `function`.

    Of an error that is not HTTP's, newer releases of what serves the API leave no text.
    """

    @functools.wraps(function)
    def refusing(*args: Any) -> None:
        try:
            function(*args)
        except KloraError as error:
            raise _bad_grid()(str(error)) from None

    return refusing


@functools.cache
def _bad_grid() -> type[KloraError]:
    from fastapi import HTTPException

    class BadGridError(KloraError, HTTPException):  # type: ignore[misc]
        def __init__(self, message: str) -> None:
            HTTPException.__init__(self, status_code=422, detail=message)

        def __str__(self) -> str:
            return str(self.detail)

    return BadGridError


def _apply_judged(p: Any, value: float, values: list[float]) -> None:
    _apply("share")(p, value, values)
    setattr(p, CELL, Cell(value, tuple(values)))


def _apply(name: str) -> Callable[[Any, Any, Any], None]:
    @_refusing
    def apply(p: Any, value: Any, _values: Any) -> None:
        _refuse_bad_cells(p)
        # A cell's `p` is a shallow copy: what is on it is shared with the other cells.
        setattr(p, OVERRIDES, {**(getattr(p, OVERRIDES, None) or {}), name: value})

    return apply


def _refuse_bad_cells(p: Any) -> None:
    """Raise KloraError before the first picture where a cell of the grid would be none; all axes are known by now."""
    axes: dict[str, list[Any]] = getattr(p, AXES, {})
    if not axes:
        return
    names, cells = tuple(axes), list(itertools.product(*axes.values()))
    # Emptied, for this dictionary is that of every cell: once is enough.
    axes.clear()
    prompt = p.prompt[0] if isinstance(p.prompt, list) else p.prompt
    tag = find_tag(prompt)
    pairs = set()
    for values in cells:
        overrides = dict(zip(names, values, strict=True))
        request = override_tag(tag, overrides) if tag else read_args(_args_of(p), overrides)
        if request is None:
            raise KloraError("an axis needs a pair: choose one in the accordion and enable it, or type a tag")
        pairs.add((request.subject, request.style))
    for pair in pairs:
        _open(*pair)


def _args_of(p: Any) -> list[Any]:
    """What the accordion or the API has handed over for the job."""
    for script in getattr(p.scripts, "alwayson_scripts", ()):
        if script.title() == TITLE:
            return list(p.script_args[script.args_from : script.args_to])
    return []


def _open(subject: str, style: str) -> None:
    from klora.errors import named_by
    from klora.webui.sides import find_side, open_pair

    names = Library()
    sides = find_side(subject, "subject", names), find_side(style, "style", names)
    with named_by(*(one.lora.path for side in sides for one in side)):
        open_pair(*sides)


def _keep(p: Any, name: str, values: list[Any]) -> None:
    if not hasattr(p, AXES):
        setattr(p, AXES, {})
    getattr(p, AXES)[name] = values


def _confirm(name: str, option: Option) -> Callable[[Any, list[Any]], None]:
    @_refusing
    def confirm(p: Any, values: list[Any]) -> None:
        _keep(p, name, values)
        for value in values:
            read = option.read(name, value)
            choices = choices_of(name, option)
            if choices and read not in choices:
                raise KloraError(f"{name}: {value!r} is not one of {', '.join(choices)}")

    return confirm


def _names() -> list[str]:
    return Library().names()


def _confirm_names(side: str) -> Callable[[Any, list[Any]], None]:
    @_refusing
    def confirm(p: Any, values: list[Any]) -> None:
        from klora.webui.sides import find_side

        _keep(p, side, values)
        for value in values:
            find_side(value, side, Library())

    return confirm
