"""The accordion "K-LoRA": its controls derive from the settings, on Gradio 3.41 as on 4.40.

What it needs of the host comes in as arguments, so that it can be mounted in a bare Gradio app.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from klora.errors import KloraError
from klora.fusion.policies import is_heeded, policies_with
from klora.settings import AUTO
from klora.webui.analysis_page import View, failure
from klora.webui.args import ARG_ORDER, NONE, FusionRequest, read_values, setting_options
from klora.webui.controls import ControlMaker, hint_of, slider_reach

TITLE = "K-LoRA"
BASIC = ("balance", "share", "subject_strength", "style_strength")
"""Settings in sight; all others are folded away."""

_BEFORE_THE_POLICYS_OWN = 3


class Names(Protocol):
    """What the menus need of a list of LoRAs."""

    def names(self) -> list[str]:
        """List the names."""

    def refresh(self) -> None:
        """Look for new files."""


Analyse = Callable[[FusionRequest, View], tuple[str, str]]
"""Gives what a pair would do, and the rule with its numbers, both as HTML; raises KloraError."""

Header = Callable[..., Any]
"""A host's accordion with a checkbox in its header: called with its value, label and elem_id, then entered."""


@dataclass
class Accordion:
    """The mounted controls: `args` by name, in ARG_ORDER; `compare` is the button of the grid of balances."""

    args: dict[str, Any] = field(default_factory=dict)
    share_slider: Any = None
    compare: Any = None

    @property
    def inputs(self) -> list[Any]:
        """The controls whose values the script gets, in their order."""
        return [self.args[name] for name in ARG_ORDER]


def build(
    tab: str,
    library: Callable[[], Names],
    analyse: Analyse,
    defaults: Mapping[str, Any] | None = None,
    header: Header | None = None,
) -> Accordion:
    """Mount the accordion in the Gradio block at hand; `tab` begins all its elements' ids.

    `defaults` are values of settings other than their own defaults. Without a `header` the checkbox is the accordion's
    first control.
    """
    import gradio as gr

    found = Accordion()
    maker = ControlMaker(gr, tab, defaults or {})
    with _mounted(gr, tab, header) as found.args["enabled"]:
        _add_pair(gr, tab, found, library)
        switch = _add_knob(gr, tab, maker, found)
        _add_row(gr, maker, found, BASIC[2:])
        button, result = _add_actions(gr, tab, found)
        with gr.Accordion("Advanced", open=False, elem_id=f"{tab}_klora_advanced"):
            _add_advanced(gr, maker, found)
            rule = gr.HTML("", elem_id=f"{tab}_klora_rule")
        _follow_policy(gr, found, switch)
        _connect_analysis(gr, tab, found, analyse, button, [result, rule])
    return found


@contextlib.contextmanager
def _mounted(gr: Any, tab: str, header: Header | None) -> Iterator[Any]:
    """Open the accordion; give the checkbox that enables it."""
    if header is not None:
        with header(False, label=TITLE, elem_id=f"{tab}_klora") as enabled:
            yield enabled
    else:
        with gr.Accordion(TITLE, open=False, elem_id=f"{tab}_klora"):
            yield gr.Checkbox(label="Enable K-LoRA", value=False, elem_id=f"{tab}_klora_enabled")


def _add_pair(gr: Any, tab: str, found: Accordion, library: Callable[[], Names]) -> None:
    with gr.Row(elem_id=f"{tab}_klora_pair", elem_classes=["klora-pair"]):
        for side in ("subject", "style"):
            found.args[side] = gr.Dropdown(
                label=f"{side.capitalize()} LoRA",
                choices=menu(library),
                value=NONE,
                allow_custom_value=True,
                elem_id=f"{tab}_klora_{side}",
            )
        button = gr.Button("\u21bb", elem_id=f"{tab}_klora_refresh_names", elem_classes=["tool"], scale=0, min_width=42)

    def refresh() -> list[Any]:
        with _shown(gr):
            library().refresh()
        return [gr.update(choices=menu(library))] * 2

    button.click(refresh, inputs=[], outputs=[found.args["subject"], found.args["style"]], show_progress=False)


def menu(library: Callable[[], Names]) -> list[str]:
    """List what a menu of LoRAs offers."""
    return [NONE, *library().names()]


def _add_knob(gr: Any, tab: str, maker: ControlMaker, found: Accordion) -> Any:
    """Add the one knob: the balance, or instead of it, where its switch is on, the share.

    What the script gets is one text, "auto" or the share; it lies unseen beside the two controls that people touch.
    """
    option, reach = setting_options()["share"], slider_reach("share", setting_options()["share"])
    assert reach is not None
    with gr.Row(elem_classes=["klora-knob"]):
        found.args["balance"] = maker.control("balance")
        share = gr.Slider(
            label=option.label,
            info=hint_of("share", option),
            minimum=reach.low,
            maximum=reach.high,
            step=reach.step,
            value=0.5,
            visible=False,
            elem_id=f"{tab}_klora_share_slider",
        )
        switch = gr.Checkbox(label="Set the share instead", value=False, elem_id=f"{tab}_klora_share_switch", scale=0)
        found.args["share"] = gr.Textbox(value=AUTO, visible=False, elem_id=f"{tab}_klora_share")
    for control in (share, switch, found.args["share"]):
        control.do_not_save_to_config = True
    text = f"(on, share) => on ? String(share) : '{AUTO}'"
    for control in (switch, share):
        in_page(control.change, text, [switch, share], [found.args["share"]])
    parts = "(text, share) => isNaN(parseFloat(text)) ? [false, share] : [true, parseFloat(text)]"
    in_page(found.args["share"].change, parts, [found.args["share"], share], [switch, share])
    found.share_slider = share
    return switch


def in_page(
    event: Callable[..., Any], code: str, inputs: Sequence[Any], outputs: Sequence[Any], then: Any = None
) -> None:
    """Have the browser answer an event by a JavaScript function, whose values go to the outputs or to `then`."""
    wiring = {"fn": then, "inputs": list(inputs), "outputs": list(outputs)}
    try:
        event(**wiring, js=code)
    except TypeError:
        # Gradio 3's name for it.
        event(**wiring, _js=code)


def _add_advanced(gr: Any, maker: ControlMaker, found: Accordion) -> None:
    names = [name for name in setting_options() if name not in BASIC]
    shared = [name for name in names if not policies_with(name)]
    _add_row(gr, maker, found, shared[:_BEFORE_THE_POLICYS_OWN])
    _add_row(gr, maker, found, [name for name in names if policies_with(name)])
    _add_row(gr, maker, found, shared[_BEFORE_THE_POLICYS_OWN:])


def _add_row(gr: Any, maker: ControlMaker, found: Accordion, names: Sequence[str]) -> None:
    with gr.Row(elem_classes=["klora-row"]):
        for name in names:
            found.args[name] = maker.control(name)


def _follow_policy(gr: Any, found: Accordion, switch: Any) -> None:
    """Show only the settings that the policy heeds, and of balance and share the one that counts."""
    own = [name for name in setting_options() if policies_with(name)]

    def show(policy: str, by_share: bool) -> list[Any]:
        heeded = is_heeded("balance", policy)
        seen = [heeded, heeded and not by_share, heeded and by_share, *(is_heeded(name, policy) for name in own)]
        return [gr.update(visible=visible) for visible in seen]

    outputs = [switch, found.args["balance"], found.share_slider, *(found.args[name] for name in own)]
    for control in (found.args["policy"], switch):
        control.change(show, inputs=[found.args["policy"], switch], outputs=outputs, show_progress=False)


def _add_actions(gr: Any, tab: str, found: Accordion) -> tuple[Any, Any]:
    """Add the buttons and the place below them where an analysis appears."""
    with gr.Row(elem_classes=["klora-actions"]):
        button = gr.Button("Analyse pair", elem_id=f"{tab}_klora_analyse")
        # Seen where a host can make a grid.
        found.compare = gr.Button("Compare five balances", elem_id=f"{tab}_klora_compare", visible=False)
        found.args["show_map"] = gr.Checkbox(label="Map in gallery", value=False, elem_id=f"{tab}_klora_show_map")
    return button, gr.HTML("", elem_id=f"{tab}_klora_result")


def _connect_analysis(
    gr: Any, tab: str, found: Accordion, analyse: Analyse, button: Any, outputs: Sequence[Any]
) -> None:
    """Analyse for the steps of the tab and in the colours of the page; mark as stale what has changed since."""
    steps = gr.Number(value=View().steps, visible=False)
    dark = gr.Checkbox(value=View().dark, visible=False)
    names = [name for name in ARG_ORDER if name not in ("enabled", "show_map")]

    def run(*values: Any) -> list[Any]:
        view = View(int(values[-2]), bool(values[-1]))
        return list(answer(analyse, dict(zip(names, values[:-2], strict=True)), view))

    inputs = [*(found.args[name] for name in names), steps, dark]
    # A page's function is given the outputs too, behind the inputs.
    code = f"""(...values) => {{
        const steps = document.querySelector('#{tab}_steps input[type=number]');
        const dark = document.querySelector('.dark') !== null;
        return [...values.slice(0, {len(names)}), Number(steps?.value) || {View().steps}, dark];
    }}"""
    in_page(button.click, code, inputs, outputs, then=run)
    for name in names:
        in_page(found.args[name].change, f"() => {{ window.kloraStale?.('{tab}'); return []; }}", [], [])


def answer(analyse: Analyse, values: Mapping[str, Any], view: View) -> tuple[str, str]:
    """What a pair would do and by which rule, as HTML; or what is wrong, and no rule."""
    try:
        return analyse(read_values(values), view)
    except KloraError as error:
        return failure(str(error)), ""


@contextlib.contextmanager
def _shown(gr: Any) -> Iterator[None]:
    """Say in the page what went wrong, where Gradio can."""
    try:
        yield
    except KloraError as error:
        getattr(gr, "Warning", print)(str(error))
