"""Several LoRAs a side, in the accordion: menus that add one, and a row with a weight for each that a side has.

What counts is the text of the side's own menu; the rows are made of it, and write it anew (javascript/klora_sides.js).
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from klora.errors import KloraError
from klora.lora.weighted import MAX_WEIGHT
from klora.webui.args import NONE, SIDES
from klora.webui.controls import in_page
from klora.webui.side_text import join_side, parts_of, quoted

MENUS = {"subject": "Another subject LoRA", "style": "Another style LoRA"}
REMOVE = "Remove"
_CHOSEN_NONE = (None, "", NONE)


class Names(Protocol):
    """What the menus need of a list of LoRAs."""

    def names(self) -> list[str]:
        """List the names."""

    def knows(self, name: str) -> bool:
        """Whether there is a LoRA of that name or alias."""

    def refresh(self) -> None:
        """Look for new files."""


Libraries = Callable[[], Names]


def menu(library: Libraries) -> list[str]:
    """List what a menu of LoRAs offers."""
    return [NONE, *library().names()]


def add_more(gr: Any, tab: str, sides: Mapping[str, Any], library: Libraries) -> list[Any]:
    """Add the rows, and the menus, folded away; give the menus, so that they are refreshed with the others."""
    own = [sides[side] for side in SIDES]
    rows = gr.HTML("", elem_id=f"{tab}_klora_rows", elem_classes=["klora-said"])
    for side, control in zip(SIDES, own, strict=True):
        written = gr.Button("", visible=False, elem_id=f"{tab}_klora_write_{side}")
        in_page(written.click, "(text) => window.kloraSide ?? text", [control], [control])
        control.change(lambda *texts: rows_of(texts, library), inputs=own, outputs=[rows], show_progress=False)
    menus = []
    with (
        gr.Accordion("Several LoRAs a side", open=False, elem_id=f"{tab}_klora_several"),
        gr.Row(elem_classes=["klora-row"]),
    ):
        for side in SIDES:
            more = gr.Dropdown(label=MENUS[side], choices=menu(library), value=NONE, elem_id=f"{tab}_klora_more_{side}")
            more.do_not_save_to_config = True
            more.change(
                lambda text, name: [added(text, name, library), NONE],
                inputs=[sides[side], more],
                outputs=[sides[side], more],
                show_progress=False,
            )
            menus.append(more)
    return menus


def added(text: str, name: str, library: Libraries) -> str:
    """What a side's menu says, with a LoRA more; the first one takes the place of none."""
    if name in _CHOSEN_NONE:
        return text
    # A name alone stays as it is, signs and all.
    return name if text in _CHOSEN_NONE else join_side([*_parts(text, library), (name, 1.0)])


def rows_of(texts: tuple[str, ...], library: Libraries) -> str:
    """A row for each LoRA of a side that is more than one LoRA as it is, as HTML; nothing where neither is."""
    shown = ("".join(map(_row, _several(text, library))) for text in texts)
    lists = [f'<div data-side="{side}">{rows}</div>' for side, rows in zip(SIDES, shown, strict=True)]
    return f'<div class="klora-parts">{"".join(lists)}</div>' if any("klora-part" in one for one in lists) else ""


def _several(text: str, library: Libraries) -> list[tuple[str, float]]:
    parts = [] if text in _CHOSEN_NONE else _parts(text, library)
    return [] if len(parts) == 1 and parts[0][1] == 1 else parts


def _row(part: tuple[str, float]) -> str:
    name, limit = html.escape(part[0]), f"{MAX_WEIGHT:g}"
    weight = repr(part[1]).removesuffix(".0")
    return (
        f'<div class="klora-part" data-name="{html.escape(quoted(part[0]))}"><span class="klora-data">{name}</span>'
        f'<input type="number" min="-{limit}" max="{limit}" step="0.05" value="{weight}" aria-label="{name}">'
        f'<button type="button" title="{REMOVE}" aria-label="{REMOVE} {name}">✕</button></div>'
    )


def _parts(text: str, library: Libraries) -> list[tuple[str, float]]:
    """The LoRAs of a text; one that cannot be read counts as a name, which is complained of where it is used."""
    try:
        return parts_of(text, "side", library().knows)
    except KloraError:
        return [(text, 1.0)]
