"""One picture at five shares: the button fills in the host's X/Y/Z plot, starts it, and puts back what was there.

It enables the accordion too, which stays so, unless a typed tag counts.
"""

from __future__ import annotations

import json
from typing import Any

from klora.balance.search import SHARES
from klora.webui.controls import in_page
from klora.webui.ui import Accordion
from klora.webui.xyz_axes import JUDGED

_SCRIPT, _PLOT = "script_list", "X/Y/Z plot"

# The page needs a moment to pass on what was filled in. What was there before comes back once the host has answered by
# showing the plot's controls; two changes of one control that it has not answered yet would count as one.
_FILL_MS, _SHOW_MS, _SETTLE_MS = 300, 15_000, 1_000


class BalanceGrid:
    """Wires the button of one tab's accordion once the host has made all controls that are needed."""

    def __init__(self, tab: str, accordion: Accordion) -> None:
        self._tab = tab
        self._accordion = accordion
        self._values = _plot(tab)
        self._controls: dict[str, Any] = {}

    def see(self, component: Any, elem_id: str | None) -> None:
        """Take note of one of the host's controls."""
        if elem_id not in self._values or elem_id in self._controls:
            return
        self._controls[elem_id] = component
        if self._controls.keys() == self._values.keys():
            self._wire()

    def _wire(self) -> None:
        import gradio as gr

        controls = [self._controls[name] for name in self._values]
        enabled, button = self._accordion.args["enabled"], self._accordion.compare
        start = gr.Button("", visible=False, elem_id=f"{self._tab}_klora_compare_start")
        button.visible = True
        kept = f"window.klora_before_{self._tab}"
        fill = f"""(...before) => {{
            {kept} = before.slice(0, {len(controls)});
            if (window.kloraHasPair && !window.kloraHasPair('{self._tab}')) {{
                return before.slice({len(controls)}, {2 * len(controls) + 1});
            }}
            setTimeout(() => document.querySelector('#{self._tab}_klora_compare_start').click(), {_FILL_MS});
            return [...{json.dumps([*self._values.values()])}, before.at(-1) || !window.kloraIsTyped?.('{self._tab}')];
        }}"""
        in_page(button.click, fill, controls, [*controls, enabled])
        run = f"""async () => {{
            const until = Date.now() + {_SHOW_MS};
            const shown = () => document.querySelector('#{list(self._values)[-1]}')?.offsetParent;
            document.querySelector('#{self._tab}_generate').click();
            do {{
                await new Promise((resolve) => setTimeout(resolve, {_SETTLE_MS}));
            }} while (!shown() && Date.now() < until);
            await new Promise((resolve) => setTimeout(resolve, {_SETTLE_MS}));
            return {kept};
        }}"""
        in_page(start.click, run, [], controls)


def _plot(tab: str) -> dict[str, Any]:
    """What the plot's controls must say, by their ids."""
    values = {
        "x_type": JUDGED,
        "x_values": ", ".join(f"{share:g}" for share in SHARES),
        "y_type": "Nothing",
        "z_type": "Nothing",
        "draw_legend": True,
        "no_fixed_seeds": False,
        "vary_seeds_x": False,
    }
    return {_SCRIPT: _PLOT, **{f"script_{tab}_xyz_plot_{name}": value for name, value in values.items()}}
