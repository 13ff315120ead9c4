"""The accordion and the grid of balances, on a Gradio that takes notes."""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from klora.balance.search import SHARES
from klora.settings import Settings
from klora.webui import analysis_run
from klora.webui.analysis_page import View
from klora.webui.analysis_run import Hear
from klora.webui.args import ARG_ORDER, FusionRequest, setting_options
from klora.webui.balance_grid import BalanceGrid, _plot
from klora.webui.controls import hint_of, slider_reach
from klora.webui.ui import Accordion, build
from tests.webui.recorded_gradio import Component, RecordedGradio

ROOT = Path(__file__).resolve().parents[2]


class NoLoras:
    def names(self) -> list[str]:
        return []

    def knows(self, name: str) -> bool:
        return False

    def refresh(self) -> None:
        pass


def analyse(_request: FusionRequest, _view: View, _hear: Any) -> tuple[str, str]:
    return "", ""


@pytest.fixture
def gradio(monkeypatch: pytest.MonkeyPatch) -> RecordedGradio:
    found = RecordedGradio()
    monkeypatch.setitem(sys.modules, "gradio", found)
    return found


def built(**more: Any) -> Accordion:
    return build("txt2img", NoLoras, analyse, **more)


def test_a_control_stands_for_every_argument_in_their_order(gradio: RecordedGradio) -> None:
    found = built()
    assert list(found.args) != list(ARG_ORDER)
    assert found.inputs == [found.args[name] for name in ARG_ORDER]


def test_every_argument_has_a_label(gradio: RecordedGradio) -> None:
    found = built()
    assert all(found.args[name].kwargs["label"] for name in ARG_ORDER)
    assert found.args["enabled"].kwargs["label"] == "Enable K-LoRA"


def test_strengths_slide_from_0_to_2_and_a_tag_may_go_beyond(gradio: RecordedGradio) -> None:
    found = built()
    for name in ("subject_strength", "style_strength"):
        made = found.args[name].kwargs
        assert (made["minimum"], made["maximum"], made["step"]) == (0, 2, 0.05)
    assert Settings(subject_strength=-3).subject_strength == -3


def test_a_share_is_set_by_a_slider_and_handed_over_as_one_text(gradio: RecordedGradio) -> None:
    found = built()
    assert found.args["share"].kwargs["value"] == "auto"
    assert found.args["share"].visible is False
    assert gradio.by_id("txt2img_klora_share_slider").kind == "Slider"


def test_formula_signs_are_under_advanced_only(gradio: RecordedGradio) -> None:
    built()
    advanced = gradio.made.index(gradio.by_id("txt2img_klora_advanced"))
    in_sight = [text for made in gradio.made[:advanced] for text in made.texts]
    assert not re.search("[αβγτρ]", " ".join(in_sight))


def test_hints_are_short_and_every_slider_has_a_reach_within_its_setting() -> None:
    for name, option in setting_options().items():
        assert option.hidden or len(hint_of(name, option) or "") <= 80, name
        if reach := slider_reach(name, option):
            assert option.low is None or option.low <= reach.low
            assert option.high is None or reach.high <= option.high


def test_each_window_is_a_row_of_two_sliders_that_the_page_makes_one(gradio: RecordedGradio) -> None:
    found = built()
    for side in ("subject", "style"):
        at = gradio.made.index(found.args[f"{side}_from"])
        assert gradio.made[at + 1] is found.args[f"{side}_to"]
        assert [gradio.made[at + beside].kind for beside in (-1, 2)] == ["Row", "Row"]
        assert gradio.made[at - 1].kwargs["elem_classes"] == ["klora-row", "klora-window"]


def test_a_share_that_a_policy_does_not_heed_is_switched_off(
    gradio: RecordedGradio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradio, "update", dict, raising=False)
    (show,) = [wired["fn"] for wired in built().args["policy"].events["change"] if wired["fn"] is not None]
    assert show("direct", True)[0] == {"visible": False, "value": False}
    assert show("k-lora", True)[0] == {"visible": True}


def test_the_cancel_button_shows_while_an_analysis_is_made_and_ends_it(
    gradio: RecordedGradio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradio, "update", dict, raising=False)

    def endless(_request: FusionRequest, _view: View, hear: Hear) -> tuple[str, str]:
        for done in itertools.count():
            hear(done, 722)
            time.sleep(0.01)
        raise AssertionError

    found = build("txt2img", NoLoras, endless)
    (begin,) = gradio.by_id("txt2img_klora_analyse").events["click"]
    (cancel,) = gradio.by_id("txt2img_klora_cancel").events["click"]
    values = {"subject": "dog", "style": "ink"}
    names = [name for name in ARG_ORDER if found.args[name] in begin["inputs"]]
    shown = begin["fn"](*(values.get(name, found.args[name].kwargs["value"]) for name in names), 20, 0, 1200)
    said, _, button = next(shown)
    assert "722" in said
    assert button == {"visible": True}
    cancel["fn"]()
    *_, (said, _, button) = shown
    assert analysis_run.CANCELLED in said
    assert button == {"visible": False}


def test_without_gradios_queue_an_analysis_shows_what_came_of_it(
    gradio: RecordedGradio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradio, "update", dict, raising=False)
    found = built(queued=False)
    (begin,) = gradio.by_id("txt2img_klora_analyse").events["click"]
    names = [name for name in ARG_ORDER if found.args[name] in begin["inputs"]]
    values = {"subject": "dog", "style": "ink"}
    shown = begin["fn"](*(values.get(name, found.args[name].kwargs["value"]) for name in names), 20, 0, 1200)
    assert shown == ["", "", {"visible": False}]


def test_the_button_of_the_grid_shows_once_the_hosts_plot_is_there(gradio: RecordedGradio) -> None:
    found = built()
    grid = BalanceGrid("txt2img", found)
    controls = {elem_id: Component("Any") for elem_id in _plot("txt2img")}
    for elem_id, control in controls.items():
        assert found.compare.visible is False
        grid.see(control, elem_id)
        grid.see(Component("Other"), "another")
    assert found.compare.visible is True
    (filled,) = found.compare.events["click"]
    assert filled["outputs"] == [*controls.values(), found.args["enabled"]]
    assert json.dumps("0.4, 0.5, 0.6, 0.7, 0.8") in filled["js"]
    (started,) = gradio.by_id("txt2img_klora_compare_start").events["click"]
    assert started["outputs"] == list(controls.values())


def test_the_grid_is_that_of_the_judged_shares_alone() -> None:
    plot = _plot("img2img")
    assert plot["script_list"] == "X/Y/Z plot"
    assert plot["script_img2img_xyz_plot_x_type"] == "[K-LoRA] Judged share"
    assert plot["script_img2img_xyz_plot_y_type"] == plot["script_img2img_xyz_plot_z_type"] == "Nothing"
    assert [float(value) for value in plot["script_img2img_xyz_plot_x_values"].split(",")] == list(SHARES)


def test_the_style_sheet_touches_nothing_but_what_is_ours() -> None:
    sheet = re.sub(r"/\*.*?\*/", "", (ROOT / "style.css").read_text(encoding="utf-8"), flags=re.DOTALL)
    selectors = [one.strip() for found in re.findall(r"([^{}]+)\{", sheet) for one in found.split(",")]
    assert len(selectors) > 50
    assert [one for one in selectors if "klora" not in one] == []
