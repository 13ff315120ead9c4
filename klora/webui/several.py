"""Several LoRAs a side, in the accordion: a menu with a weight for each side, which adds to what its own menu says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from klora.errors import KloraError
from klora.webui.args import NONE, SIDES
from klora.webui.side_text import join_side, split_side

MENUS = {"subject": "Another subject LoRA", "style": "Another style LoRA"}


def add_more(gr: Any, tab: str, sides: Mapping[str, Any], choices: Callable[[], Sequence[str]]) -> list[Any]:
    """Add the menus, folded away; give them, so that they are refreshed with the others."""
    menus = []
    with gr.Accordion("Several LoRAs a side", open=False, elem_id=f"{tab}_klora_several"):
        for side in SIDES:
            with gr.Row(elem_classes=["klora-row"]):
                menu = gr.Dropdown(
                    label=MENUS[side], choices=list(choices()), value=NONE, elem_id=f"{tab}_klora_more_{side}"
                )
                weight = gr.Slider(
                    label="Weight", minimum=0, maximum=2, step=0.05, value=1, elem_id=f"{tab}_klora_more_{side}_weight"
                )
                button = gr.Button("Add", elem_id=f"{tab}_klora_add_{side}", scale=0)
            for control in (menu, weight):
                control.do_not_save_to_config = True
            button.click(added, inputs=[sides[side], menu, weight], outputs=[sides[side]], show_progress=False)
            menus.append(menu)
    return menus


def added(text: str, name: str, weight: float) -> str:
    """What a side's menu says, with a LoRA more; the first one takes the place of none."""
    if name in (None, "", NONE):
        return text
    if text in (None, "", NONE):
        # A name alone stays as it is, signs and all.
        return name if weight == 1 else join_side([(name, weight)])
    try:
        parts = split_side(text, "side")
    except KloraError:
        parts = [(text, 1.0)]
    return join_side([*parts, (name, weight)])
