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
from klora.settings import Option, Settings
from klora.webui.args import ARG_ORDER, NONE, FusionRequest, choices_of, read_values, setting_options, text_of

TITLE = "K-LoRA"
BASIC = ("balance", "share", "subject_strength", "style_strength")
"""Settings in sight; all others are folded away."""

_IN_A_ROW = 3
_STEPS = {"balance": 0.05, "share": 0.01}
_HINTS = {
    "balance": "left: more of the subject, right: more of the style, 0: as in the paper",
    "share": "wished fraction of the subject, 0 to 1; the balance then follows",
    # Their labels say it.
    "subject_strength": None,
    "style_strength": None,
}


class Names(Protocol):
    """What the menus need of a list of LoRAs."""

    def names(self) -> list[str]:
        """List the names."""

    def refresh(self) -> None:
        """Look for new files."""


Analyse = Callable[[FusionRequest], tuple[Any, str]]
"""Gives the selection map and a summary of two lines for a request; raises KloraError."""


@dataclass
class Accordion:
    """The mounted controls: `args` by name, in ARG_ORDER."""

    args: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> list[Any]:
        """The controls whose values the script gets, in their order."""
        return [self.args[name] for name in ARG_ORDER]


def build(
    tab: str, library: Callable[[], Names], analyse: Analyse, defaults: Mapping[str, Any] | None = None
) -> Accordion:
    """Mount the accordion in the Gradio block at hand; `tab` begins all its elements' ids.

    `defaults` are values of settings other than their own defaults.
    """
    import gradio as gr

    found = Accordion()
    with gr.Accordion(TITLE, open=False, elem_id=f"{tab}_klora", elem_classes=["klora"]):
        found.args["enabled"] = gr.Checkbox(label="Enable K-LoRA", value=False, elem_id=f"{tab}_klora_enabled")
        _add_pair(gr, tab, found, library)
        maker = _Maker(gr, tab, defaults or {})
        _add_basic(gr, maker, found)
        with gr.Accordion("Advanced", open=False, elem_id=f"{tab}_klora_advanced"):
            _add_advanced(gr, maker, found)
        _add_analysis(gr, tab, found, analyse)
    return found


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
        button = gr.Button(
            "\U0001f504", elem_id=f"{tab}_klora_refresh_names", elem_classes=["tool"], scale=0, min_width=42
        )

    def refresh() -> list[Any]:
        with _shown(gr):
            library().refresh()
        return [gr.update(choices=menu(library))] * 2

    button.click(refresh, inputs=[], outputs=[found.args["subject"], found.args["style"]], show_progress=False)


def menu(library: Callable[[], Names]) -> list[str]:
    """List what a menu of LoRAs offers."""
    return [NONE, *library().names()]


def _add_basic(gr: Any, maker: _Maker, found: Accordion) -> None:
    found.args["balance"] = maker.control("balance")
    _add_row(gr, maker, found, BASIC[1:])


def _add_advanced(gr: Any, maker: _Maker, found: Accordion) -> None:
    known = setting_options()
    names = [name for name in known if name not in BASIC]
    shared = [name for name in names if not policies_with(name)]
    _add_row(gr, maker, found, shared[:_IN_A_ROW])
    # Of these, only those show that the policy above heeds.
    _add_row(gr, maker, found, [name for name in names if policies_with(name)])
    for start in range(_IN_A_ROW, len(shared), _IN_A_ROW):
        _add_row(gr, maker, found, shared[start : start + _IN_A_ROW])
    follow = [name for name in known if policies_with(name) or name in ("balance", "share")]

    def show(policy: str) -> list[Any]:
        return [gr.update(visible=is_heeded(name, policy)) for name in follow]

    found.args["policy"].change(
        show, inputs=[found.args["policy"]], outputs=[found.args[name] for name in follow], show_progress=False
    )


def _add_row(gr: Any, maker: _Maker, found: Accordion, names: Sequence[str]) -> None:
    with gr.Row(elem_classes=["klora-row"]):
        for name in names:
            found.args[name] = maker.control(name)


def _add_analysis(gr: Any, tab: str, found: Accordion, analyse: Analyse) -> None:
    with gr.Row(elem_classes=["klora-analysis"]):
        button = gr.Button("Analyse pair", elem_id=f"{tab}_klora_analyse")
        found.args["show_map"] = gr.Checkbox(
            label="Selection map in gallery", value=False, elem_id=f"{tab}_klora_show_map"
        )
    summary = gr.Textbox(
        show_label=False, container=False, lines=2, interactive=False, visible=False, elem_id=f"{tab}_klora_summary"
    )
    picture = gr.Image(show_label=False, type="pil", interactive=False, visible=False, elem_id=f"{tab}_klora_map")
    inputs = [name for name in ARG_ORDER if name not in ("enabled", "show_map")]

    def run(*values: Any) -> list[Any]:
        image, text = answer(analyse, dict(zip(inputs, values, strict=True)))
        return [gr.update(value=text, visible=True), gr.update(value=image, visible=image is not None)]

    button.click(run, inputs=[found.args[name] for name in inputs], outputs=[summary, picture])


def answer(analyse: Analyse, values: Mapping[str, Any]) -> tuple[Any, str]:
    """The map and two lines about a pair, or no map and one line that says what is wrong."""
    try:
        return analyse(read_values(values))
    except KloraError as error:
        return None, " ".join(str(error).split())


@contextlib.contextmanager
def _shown(gr: Any) -> Iterator[None]:
    """Say in the page what went wrong, where Gradio can."""
    try:
        yield
    except KloraError as error:
        getattr(gr, "Warning", print)(str(error))


class _Maker:
    """Makes the control of a setting from its description."""

    def __init__(self, gr: Any, tab: str, defaults: Mapping[str, Any]) -> None:
        self._gr = gr
        self._tab = tab
        self._defaults = defaults
        self._options = setting_options()

    def control(self, name: str) -> Any:
        """Make one control."""
        option = self._options[name]
        value = self._defaults.get(name, getattr(Settings(), name))
        common = {
            "label": option.label,
            "info": _HINTS.get(name, option.help),
            "elem_id": f"{self._tab}_klora_{name}",
            "visible": not option.hidden and is_heeded(name, str(self._defaults.get("policy", Settings().policy))),
        }
        made = self._of_kind(name, option, value, common)
        # Its default is kept in the host's settings, and not beside it in ui-config.json too.
        made.do_not_save_to_config = True
        return made

    def _of_kind(self, name: str, option: Option, value: Any, common: Mapping[str, Any]) -> Any:
        gr = self._gr
        if choices := choices_of(name, option):
            return gr.Dropdown(choices=list(choices), value=value, **common)
        if option.optional or option.free:
            return gr.Textbox(value=str(text_of(value)), max_lines=1, **common)
        if option.low is not None and option.high is not None:
            step = _STEPS.get(name, 1 if option.kind is int else 0.05)
            return gr.Slider(minimum=option.low, maximum=option.high, step=step, value=value, **common)
        return gr.Number(value=value, precision=0 if option.kind is int else None, **common)


def changed_defaults(read: Callable[[str], Any], names: Sequence[str]) -> dict[str, Any]:
    """The defaults that `read` finds for settings, without those that are impossible."""
    found = {}
    for name, option in setting_options().items():
        if name in names:
            with contextlib.suppress(KloraError):
                value = option.read(name, read(name))
                if value in (choices_of(name, option) or (value,)):
                    found[name] = value
    return found
