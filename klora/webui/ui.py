"""The accordion "K-LoRA": its controls derive from the settings, on Gradio 3.41 as on 4.40.

What it needs of the host comes in as arguments, so that it can be mounted in a bare Gradio app.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from klora.errors import KloraError
from klora.fusion.policies import OF_SCALES, POLICIES, is_heeded, policies_with
from klora.settings import AUTO, Settings
from klora.webui.analysis_page import View, failure, told
from klora.webui.analysis_run import AnalysisRun, Hear, Result
from klora.webui.args import ARG_ORDER, NONE, FusionRequest, read_values, setting_options
from klora.webui.controls import ControlMaker, hint_of, in_page, slider_reach
from klora.webui.several import Libraries, add_more, menu

TITLE = "K-LoRA"
BASIC = ("balance", "share", "subject_strength", "style_strength")
"""Settings in sight; all others are folded away."""

_BEFORE_THE_POLICYS_OWN = 3
_WINDOWS = (("subject_from", "subject_to"), ("style_from", "style_to"))
"""Two sliders each, which the page lays over each other as one with two handles."""

_BLOCKS = ("subject_blocks", "style_blocks")


Analyse = Callable[[FusionRequest, View, Hear], Result]
"""Gives what a pair would do, told how many modules have been scored, of how many; raises KloraError."""

Misfit = Callable[[str, str, str], str]
"""Says of a subject, a style and a checkpoint's title that they do not go together; nothing where they do."""

Save = Callable[[FusionRequest, str], str]
"""Saves a fusion as one LoRA of a name and says so; raises KloraError."""

SAVE, NOT_ONE_FILE = "Save as LoRA", "This policy depends on the step, which no file can hold"


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
    library: Libraries,
    analyse: Analyse,
    defaults: Mapping[str, Any] | None = None,
    misfit: Misfit | None = None,
    save: Save | None = None,
    queued: bool = True,
) -> Accordion:
    """Mount the accordion in the Gradio block at hand; `tab` begins all its elements' ids.

    `defaults` are values of settings other than their own defaults. The page's script shows the first control, which
    enables K-LoRA, in the header, where it is apart from the fold. Where Gradio's events are not `queued`, an analysis
    shows no more than what came of it.
    """
    import gradio as gr

    found = Accordion()
    maker = ControlMaker(gr, tab, defaults or {})
    with gr.Accordion(TITLE, open=False, elem_id=f"{tab}_klora"):
        found.args["enabled"] = gr.Checkbox(label="Enable K-LoRA", value=False, elem_id=f"{tab}_klora_enabled")
        found.args["enabled"].do_not_save_to_config = True
        _add_pair(gr, tab, found, library)
        if misfit is not None:
            _add_misfit(gr, tab, found, misfit)
        switch = _add_knob(gr, tab, maker, found)
        _add_row(gr, maker, found, BASIC[2:])
        buttons, result = _add_actions(gr, tab, found)
        with gr.Accordion("Advanced", open=False, elem_id=f"{tab}_klora_advanced"):
            _add_advanced(gr, maker, found)
            rule = gr.HTML("", elem_id=f"{tab}_klora_rule", elem_classes=["klora-said"])
            button = _add_saving(gr, tab, found, save) if save is not None else None
        _follow_policy(gr, found, switch, button)
        _connect_analysis(gr, tab, found, analyse, buttons, [result, rule], queued)
    return found


def _add_pair(gr: Any, tab: str, found: Accordion, library: Libraries) -> None:
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

    sides = [found.args["subject"], found.args["style"]]
    menus = [*sides, *add_more(gr, tab, found.args, library)]

    def refresh() -> list[Any]:
        library().refresh()
        return [gr.update(choices=menu(library))] * len(menus)

    button.click(refresh, inputs=[], outputs=menus, show_progress=False)


def _add_misfit(gr: Any, tab: str, found: Accordion, misfit: Misfit) -> None:
    """Say where a pair is for another model than the chosen checkpoint; the page's script asks when that changes."""
    said = gr.HTML("", elem_id=f"{tab}_klora_misfit", elem_classes=["klora-said"])
    checkpoint = gr.Textbox("", visible=False)
    ask = gr.Button("", visible=False, elem_id=f"{tab}_klora_ask_misfit")

    def answer_misfit(subject: str, style: str, title: str) -> str:
        found = misfit(subject, style, title)
        return failure(found) if found else ""

    code = "(subject, style, title) => [subject, style, window.kloraCheckpoint?.() ?? '']"
    inputs = [found.args["subject"], found.args["style"], checkpoint]
    for event in (ask.click, found.args["subject"].change, found.args["style"].change):
        in_page(event, code, inputs, [said], then=answer_misfit)


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
        found.args["share"] = gr.Textbox(label=option.label, value=AUTO, visible=False, elem_id=f"{tab}_klora_share")
    for control in (share, switch, found.args["share"]):
        control.do_not_save_to_config = True
    text = f"(on, share) => on ? String(share) : '{AUTO}'"
    for control in (switch, share):
        in_page(control.change, text, [switch, share], [found.args["share"]])
    parts = "(text, share) => isNaN(parseFloat(text)) ? [false, share] : [true, parseFloat(text)]"
    in_page(found.args["share"].change, parts, [found.args["share"], share], [switch, share])
    found.share_slider = share
    return switch


def _add_advanced(gr: Any, maker: ControlMaker, found: Accordion) -> None:
    names = [name for name in setting_options() if name not in BASIC]
    apart = {*_BLOCKS, *(name for window in _WINDOWS for name in window)}
    shared = [name for name in names if not policies_with(name) and name not in apart]
    _add_row(gr, maker, found, shared[:_BEFORE_THE_POLICYS_OWN])
    _add_row(gr, maker, found, [name for name in names if policies_with(name)])
    _add_row(gr, maker, found, shared[_BEFORE_THE_POLICYS_OWN:])
    for window in _WINDOWS:
        _add_row(gr, maker, found, window, "klora-window")
    _add_row(gr, maker, found, _BLOCKS)


def _add_row(gr: Any, maker: ControlMaker, found: Accordion, names: Sequence[str], *kind: str) -> None:
    with gr.Row(elem_classes=["klora-row", *kind]):
        for name in names:
            found.args[name] = maker.control(name)


def _follow_policy(gr: Any, found: Accordion, switch: Any, save: Any) -> None:
    """Show only the settings that the policy heeds, and of balance and share the one that counts."""
    of_some = OF_SCALES - {"balance", "share"}
    own = [name for name in setting_options() if policies_with(name) or name in of_some]

    def show(policy: str, by_share: bool) -> list[Any]:
        heeded = is_heeded("balance", policy)
        seen = [heeded and not by_share, heeded and by_share, *(is_heeded(name, policy) for name in own)]
        # A share that cannot be seen is none.
        shown = gr.update(visible=heeded) if heeded else gr.update(visible=False, value=False)
        static = POLICIES[policy].static
        button = gr.update(value=SAVE if static else NOT_ONE_FILE, interactive=static)
        return [shown, *(gr.update(visible=visible) for visible in seen), *([button] if save is not None else ())]

    outputs = [switch, found.args["balance"], found.share_slider, *(found.args[name] for name in own)]
    outputs += [save] if save is not None else []
    for control in (found.args["policy"], switch):
        control.change(show, inputs=[found.args["policy"], switch], outputs=outputs, show_progress=False)


def _add_actions(gr: Any, tab: str, found: Accordion) -> tuple[Sequence[Any], Any]:
    """Add the buttons, those of the analysis first, and the place below them where an analysis appears."""
    with gr.Row(elem_classes=["klora-actions"]):
        button = gr.Button("Analyse pair", elem_id=f"{tab}_klora_analyse")
        cancel = gr.Button("Cancel", elem_id=f"{tab}_klora_cancel", visible=False)
        # Seen where a host can make a grid.
        found.compare = gr.Button("Compare five balances", elem_id=f"{tab}_klora_compare", visible=False)
        found.args["show_map"] = gr.Checkbox(label="Map in gallery", value=False, elem_id=f"{tab}_klora_show_map")
    return (button, cancel), gr.HTML("", elem_id=f"{tab}_klora_result", elem_classes=["klora-said"])


def _of_the_fusion(found: Accordion) -> dict[str, Any]:
    """The controls that say what the fusion is, by name."""
    return {name: found.args[name] for name in ARG_ORDER if name not in ("enabled", "show_map")}


def _add_saving(gr: Any, tab: str, found: Accordion, save: Save) -> Any:
    """Add the name and the button that save the fusion as one LoRA; give the button."""
    static = POLICIES[Settings().policy].static
    with gr.Row(elem_classes=["klora-saving"]):
        name = gr.Textbox(label="Name of the LoRA", value="", max_lines=1, elem_id=f"{tab}_klora_save_name")
        button = gr.Button(SAVE if static else NOT_ONE_FILE, interactive=static, elem_id=f"{tab}_klora_save")
    name.do_not_save_to_config = True
    said = gr.HTML("", elem_id=f"{tab}_klora_saved", elem_classes=["klora-said"])
    controls = _of_the_fusion(found)

    def run(*values: Any) -> str:
        try:
            return told(save(read_values(dict(zip(controls, values[:-1], strict=True))), str(values[-1] or "")))
        except KloraError as error:
            return failure(str(error))

    button.click(run, inputs=[*controls.values(), name], outputs=[said])
    return button


def _connect_analysis(
    gr: Any,
    tab: str,
    found: Accordion,
    analyse: Analyse,
    buttons: Sequence[Any],
    outputs: Sequence[Any],
    queued: bool,
) -> None:
    """Analyse for the steps of the tab, in the page's colours and width; mark as stale what has changed since."""
    button, cancel = buttons
    steps, dark, width = (gr.Number(value=value, visible=False) for value in (View().steps, 0, View().width))
    controls = _of_the_fusion(found)
    running: list[AnalysisRun] = []

    def run(*values: Any) -> Iterator[list[Any]]:
        view = View(int(values[-3]), bool(values[-2]), int(values[-1]))
        for shown in answer(analyse, dict(zip(controls, values[:-3], strict=True)), view, running):
            if isinstance(shown, str):
                yield [shown or gr.update(), gr.update(), gr.update(visible=True)]
            else:
                yield [*shown, gr.update(visible=False)]

    def run_to_the_end(*values: Any) -> list[Any]:
        *_, shown = run(*values)
        return shown

    def stop() -> None:
        for one in running:
            one.cancel()

    inputs = [*controls.values(), steps, dark, width]
    # A page's function is given the outputs too, behind the inputs.
    code = f"""(...values) => {{
        const steps = document.querySelector('#{tab}_steps input[type=number]');
        const accordion = document.querySelector('#{tab}_klora');
        const ink = getComputedStyle(accordion).color.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const dark = Math.max(...ink) > 127;
        return [...values.slice(0, {len(controls)}), Number(steps?.value) || {View().steps}, Number(dark),
            accordion.clientWidth || {View().width}];
    }}"""
    # Without a queue Gradio 3 takes no function that yields.
    in_page(button.click, code, inputs, [*outputs, cancel], then=run if queued else run_to_the_end)
    cancel.click(stop, inputs=[], outputs=[], queue=False)
    for control in controls.values():
        in_page(control.change, f"() => {{ window.kloraChanged?.('{tab}'); return []; }}", [], [])


def answer(
    analyse: Analyse, values: Mapping[str, Any], view: View, running: list[AnalysisRun] | None = None
) -> Iterator[str | Result]:
    """How far an analysis is, and at last what a pair would do and by which rule, as HTML; or what is wrong.

    While it is under way it is in `running`.
    """
    try:
        request = read_values(values)
    except KloraError as error:
        yield failure(str(error)), ""
        return
    one = AnalysisRun(f"{request.subject} × {request.style}", partial(analyse, request, view))
    running = [] if running is None else running
    running.append(one)
    try:
        yield from one.watch()
    finally:
        one.cancel()
        running.remove(one)
