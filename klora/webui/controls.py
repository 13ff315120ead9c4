"""The control of a setting, made from its description, and its events, on Gradio 3.41 as on 4.40."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from klora.errors import KloraError
from klora.fusion.policies import is_heeded
from klora.settings import Option, Settings
from klora.webui.args import choices_of, setting_options, text_of


class Reach(NamedTuple):
    """What a slider reaches; a tag and the API may go as far as the setting does."""

    low: float
    high: float
    step: float


_REACHES = {
    "balance": Reach(-2, 2, 0.05),
    "share": Reach(0, 1, 0.01),
    "subject_strength": Reach(0, 2, 0.05),
    "style_strength": Reach(0, 2, 0.05),
}

_HINTS = {
    "balance": "left: more subject, right: more style, 0: as in the paper",
    "share": "part of all choices that the subject gets",
    # Their labels say it.
    "subject_strength": None,
    "style_strength": None,
    "policy": "the rule that chooses",
    "variant": "the paper, or the authors' code",
    "scale": "s*: style at the very start too",
    "alpha": "change over the steps; auto: 1.5",
    "beta": "start; auto: 0.5 for s, 1.3 for s*",
    "k": "auto: the product of the ranks",
    "gamma": "evens out the files; auto: computed",
    "scope": "modules under the rule; auto: all",
    "other_layers": "outside the scope; auto: both",
    "text_encoder": "whose text part acts; auto: both",
    "unpaired": "keep: its file acts; drop: none",
    "progress": "absolute: true place; relative: 0",
    "passes": "passes of a hires fix that fuse",
    "seed": "seed of what is drawn at random",
    "preset": "weights of subject and style",
    "period": "steps until the other LoRA's turn",
    "gamma_power": "1: γ; 2: γ²",
    "mu": "how much of the overlap is taken away",
    "distance": "how a LoRA's effect is measured",
    "tokens": "tokens compared per layer",
    "reuse": "steps for which a choice holds",
    "refresh": "steps for which a prediction is kept",
    "style_refs": "names in their folder, separated by ;",
    "subject_refs": "names in their folder, separated by ;",
    "discrepancy": "how alike both LoRAs' pictures are",
    "refine_step": "how far latents move per step",
    "refine_from": "0: first step, 1: last step",
    "refine_to": "0: first step, 1: last step",
    "subject_from": "before, the style alone",
    "subject_to": "after, the style alone",
    "style_from": "before, the subject alone",
    "style_to": "after, the subject alone",
    "subject_blocks": "as on the map: up 1: 0.5, mid: 0",
    "style_blocks": "as on the map: up 1: 0.5, mid: 0",
}


def hint_of(name: str, option: Option) -> str | None:
    """The few words below a setting's label: its own here, else how its explanation begins."""
    return _HINTS.get(name, option.help.partition(";")[0])


def slider_reach(name: str, option: Option) -> Reach | None:
    """What a setting's slider reaches; None for a setting without one."""
    if name in _REACHES:
        return _REACHES[name]
    if option.low is None or option.high is None or option.optional or option.free or option.choices:
        return None
    return Reach(option.low, option.high, 1 if option.kind is int else 0.05)


class ControlMaker:
    """Makes controls in the Gradio block at hand; `tab` begins their ids, `defaults` are a user's own first values."""

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
            "info": hint_of(name, option),
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
        if reach := slider_reach(name, option):
            return gr.Slider(minimum=reach.low, maximum=reach.high, step=reach.step, value=value, **common)
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
