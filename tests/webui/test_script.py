"""The script, the axes, the settings page and the paste, on modules that look like a host's."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from klora.errors import KloraError
from klora.webui import api, options, paste, register, ui, xyz_axes
from klora.webui.analysis_page import View
from klora.webui.analysis_run import AnalysisRun
from klora.webui.args import ARG_ORDER, FusionRequest
from klora.webui.script import make_script, map_wanted
from tests.webui.recorded_gradio import RecordedGradio


class OptionInfo:
    """Keeps what a setting was declared with."""

    def __init__(self, default: Any = None, label: str = "", *component: Any, section: Any = None) -> None:
        self.default, self.label, self.component, self.section = default, label, component, section

    def info(self, _text: str) -> OptionInfo:
        return self

    def needs_reload_ui(self) -> OptionInfo:
        return self


class Options(types.SimpleNamespace):
    def add_option(self, key: str, info: OptionInfo) -> None:
        self.added = {**getattr(self, "added", {}), key: info}


class AxisOption:
    def __init__(self, label: str, type: Any, apply: Any, confirm: Any, cost: float, choices: Any) -> None:
        self.label, self.type, self.apply, self.confirm = label, type, apply, confirm
        self.cost, self.choices = cost, choices


class HttpError(Exception):
    def __init__(self, status_code: int, detail: str) -> None:
        self.status_code, self.detail = status_code, detail


class OnDisk:
    def __init__(self, name: str, hash: str | None, folder: Path) -> None:
        self.name, self.file_hash, self.hash = name, hash, hash
        self.filename = str(folder / f"{name}.safetensors")
        self.reads = 0

    @property
    def shorthash(self) -> str | None:
        return self.hash

    def read_hash(self) -> None:
        self.reads += 1
        self.hash = self.file_hash

    def get_alias(self) -> str:
        return self.name


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    modules = {
        name: types.ModuleType(name)
        for name in ("modules", "modules.scripts", "modules.shared", "modules.paths", "modules.options")
    }
    networks = types.ModuleType("networks")
    names = {name: OnDisk(name, value, tmp_path) for name, value in {"puppy": "d8d8", "ink": "da05"}.items()}
    vars(networks).update(
        available_networks=names,
        available_network_aliases=dict(names),
        available_network_hash_lookup={"da05": names["ink"]},
        forbidden_network_aliases={},
        list_available_networks=lambda: None,
    )
    plot = types.SimpleNamespace(axis_options=[AxisOption("Seed", int, None, None, 0, None)], AxisOption=AxisOption)
    vars(modules["modules.scripts"]).update(
        Script=type("Script", (), {}),
        AlwaysVisible=object(),
        scripts_data=[types.SimpleNamespace(path="/host/scripts/xyz_grid.py", module=plot)] * 2,
    )
    vars(modules["modules.shared"]).update(
        opts=Options(), OptionInfo=OptionInfo, cmd_opts=types.SimpleNamespace(api_auth=None)
    )
    vars(modules["modules.paths"]).update(data_path=str(tmp_path))
    categories: dict[str, str] = {}
    vars(modules["modules.options"]).update(categories=types.SimpleNamespace(register_category=categories.setdefault))
    fastapi = types.ModuleType("fastapi")
    vars(fastapi).update(HTTPException=HttpError)
    for name, module in {**modules, "networks": networks, "gradio": RecordedGradio(), "fastapi": fastapi}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return types.SimpleNamespace(
        scripts=modules["modules.scripts"],
        shared=modules["modules.shared"],
        plot=plot,
        networks=networks,
        categories=categories,
    )


class Processing:
    def __init__(self, prompt: str) -> None:
        self.prompt, self.scripts = prompt, None
        self.all_prompts = [prompt]
        self.extra_generation_params: dict[str, Any] = {}
        self.comments: list[str] = []

    def comment(self, text: str) -> None:
        self.comments.append(text)


def test_the_script_is_always_on_and_named_for_the_api(host: Any) -> None:
    script = make_script()()
    assert script.title().lower() == "k-lora"
    assert script.show(False) is script.show(True) is host.scripts.AlwaysVisible


@pytest.mark.parametrize("no_queue", [False, True])
def test_an_analysis_tells_how_far_it_is_only_where_the_host_has_gradios_queue(host: Any, no_queue: bool) -> None:
    host.shared.cmd_opts.no_gradio_queue = no_queue
    make_script()().ui(False)
    (begun,) = sys.modules["gradio"].by_id("txt2img_klora_analyse").events["click"]
    # Gradio 3 asks this too, and refuses without its queue.
    assert inspect.isgeneratorfunction(begun["fn"]) is not no_queue


def test_good_arguments_become_a_tag_and_disabled_ones_change_nothing(host: Any) -> None:
    p = Processing("a")
    make_script()().process(p, {"subject": "puppy", "style": "ink"})
    assert p.all_prompts == ["a <klora:puppy:ink>"]
    p = Processing("a")
    make_script()().process(p, False, "puppy", "ink")
    assert p.all_prompts == ["a"]
    assert not p.extra_generation_params
    assert not p.comments


def test_bad_arguments_are_told_in_a_comment_and_the_infotext(host: Any) -> None:
    p = Processing("a")
    make_script()().process(p, {"subject": "puppy", "style": "ink", "beta": "much"})
    assert p.all_prompts == ["a"]
    assert "beta" in p.extra_generation_params["K-LoRA error"]
    assert any("beta" in comment for comment in p.comments)


def test_the_map_is_added_only_where_it_is_wanted_and_something_ran(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klora.webui.analysis.gallery_map", lambda plan, tag: f"map of {plan} for {tag}")
    monkeypatch.setattr("klora.webui.analysis.map_text", lambda plan, tag: f"text of {plan}")
    script, p = make_script()(), Processing("a <klora:puppy:ink>")
    processed = types.SimpleNamespace(images=["a"], infotexts=["b"])
    script.postprocess(p, processed, {"show_map": True})
    p.klora_plans = ["one", "one", "two"]  # type: ignore[attr-defined]
    script.postprocess(p, processed, {"show_map": False})
    assert processed.images == ["a"]
    script.postprocess(p, processed, {"show_map": True})
    assert processed.images == ["a", "map of one for <klora:puppy:ink>", "map of two for <klora:puppy:ink>"]
    assert processed.infotexts == ["b", "text of one", "text of two"]
    host.shared.opts.klora_show_map = True
    script.postprocess(p, processed, False)
    assert len(processed.images) == 5


def test_the_map_can_be_wanted_with_a_typed_tag() -> None:
    assert map_wanted([{"show_map": True}])
    assert map_wanted([name == "show_map" for name in ARG_ORDER])
    assert not map_wanted([{"bta": 1}])


def test_axes_are_added_once_with_costs_and_choices(host: Any) -> None:
    xyz_axes.add_axes()
    xyz_axes.add_axes()
    labels = [axis.label for axis in host.plot.axis_options]
    names = ("Subject", "Style", "Balance", "α", "β", "Scale", "Policy", "Subject strength", "Style strength", "Scope")
    windows = ("Subject from", "Subject to", "Style from", "Style to", "Subject by block", "Style by block")
    assert labels == ["Seed", *(f"[K-LoRA] {name}" for name in (*names, *windows, "Judged share"))]
    axes = {axis.label.removeprefix("[K-LoRA] "): axis for axis in host.plot.axis_options}
    assert axes["Style"].choices() == ["ink", "puppy"]
    assert axes["Style"].cost > axes["Balance"].cost
    assert axes["β"].type is float
    assert "s*" in axes["Scale"].choices()
    assert "k-lora" in axes["Policy"].choices()


def test_an_axis_keeps_its_value_on_one_cell_and_refuses_bad_ones_before_the_plot(host: Any) -> None:
    import copy

    xyz_axes.add_axes()
    axes = {axis.label.removeprefix("[K-LoRA] "): axis for axis in host.plot.axis_options}
    p = Processing("a")
    axes["β"].apply(p, 0.6, [])
    cell = copy.copy(p)
    axes["Balance"].apply(cell, 1.0, [])
    assert p.klora_overrides == {"beta": 0.6}  # type: ignore[attr-defined]
    assert cell.klora_overrides == {"beta": 0.6, "balance": 1.0}  # type: ignore[attr-defined]
    for label, bad in (("β", -1.0), ("Policy", "nonsense"), ("Scale", "t"), ("Subject", "unknown")):
        with pytest.raises(KloraError) as refused:
            axes[label].confirm(p, [bad])
        assert refused.value.status_code == 422  # type: ignore[attr-defined]
        assert refused.value.detail == str(refused.value)  # type: ignore[attr-defined]
    axes["Subject"].confirm(p, ["puppy"])


@pytest.mark.parametrize(
    ("prompt", "grid", "says"),
    [
        ("a <klora:puppy:ink>", {"α": [1.0, 0.0], "Scale": ["s", "s*"]}, "alpha"),
        ("a", {"Balance": [-1.0, 1.0]}, "an axis needs a pair"),
        ("a", {"Subject": ["puppy"]}, "an axis needs a pair"),
        ("a <klora:puppy:ink:beta=x>", {"Balance": [0.0]}, "beta"),
    ],
)
def test_a_grid_with_a_cell_that_would_be_no_fusion_is_refused_before_its_first_picture(
    host: Any, prompt: str, grid: dict[str, list[Any]], says: str
) -> None:
    xyz_axes.add_axes()
    axes = {axis.label.removeprefix("[K-LoRA] "): axis for axis in host.plot.axis_options}
    p = Processing(prompt)
    for label, values in grid.items():
        axes[label].confirm(p, values)
    label, values = next(iter(grid.items()))
    with pytest.raises(KloraError, match=says):
        axes[label].apply(p, values[0], values)


def test_the_settings_page_has_defaults_cache_and_map(host: Any) -> None:
    options.register_options()
    added = host.shared.opts.added
    assert {"klora_cache_folder", "klora_cache_megabytes", "klora_show_map", "klora_default_balance"} <= added.keys()
    assert all(info.section == ("klora", "K-LoRA") for info in added.values())


def test_the_settings_page_has_a_group_of_its_own_where_the_host_groups_them(host: Any) -> None:
    options.register_options()
    assert host.categories == {"klora": "K-LoRA"}
    assert {info.category_id for info in host.shared.opts.added.values()} == {"klora"}


def test_chosen_defaults_count_and_impossible_ones_do_not(host: Any) -> None:
    host.shared.opts.klora_default_text_encoder = "style"
    host.shared.opts.klora_default_balance = "rubbish"
    host.shared.opts.klora_default_policy = "nonsense"
    found = options.defaults()
    assert found["text_encoder"] == "style"
    assert "balance" not in found
    assert "policy" not in found


def test_the_cache_is_where_and_as_large_as_the_settings_say(host: Any, tmp_path: Path) -> None:
    assert options.score_cache().folder == tmp_path / "cache" / "klora"
    host.shared.opts.klora_cache_folder = str(tmp_path / "mine")
    host.shared.opts.klora_cache_megabytes = 3
    cache = options.score_cache()
    assert (cache.folder, cache.max_bytes) == (tmp_path / "mine", 3 * 2**20)


def test_a_renamed_file_is_found_even_before_the_host_has_hashed_it(host: Any) -> None:
    host.networks.available_networks["puppy"].hash = None
    params = {"Prompt": "<klora:dog:ink>", "Lora hashes": "dog: d8d8, ink: da05"}
    paste.on_pasted("", params)
    assert params["Prompt"] == "<klora:puppy:ink>"
    assert host.networks.available_networks["ink"].reads == 0


def test_a_known_name_with_another_hash_is_not_searched_for(host: Any) -> None:
    params = {"Prompt": "<klora:puppy:ink>", "Lora hashes": "puppy: ffff"}
    paste.on_pasted("", params)
    assert params["Prompt"] == "<klora:puppy:ink>"


def test_unknown_names_and_paths_are_not_analysed(host: Any) -> None:
    for name in ("dog", "/etc/passwd", "../puppy"):
        with pytest.raises(api.UnknownLoraError) as caught:
            api.analysis({"subject": "ink", "style": name})
        assert caught.value.side == "style"


def test_credentials_are_read_and_compared() -> None:
    known = api.credentials_of("u:p,other:q:r")
    assert api.is_allowed(known, "u", "p")
    assert api.is_allowed(known, "other", "q:r")
    assert not api.is_allowed(known, "u", "é")
    assert not api.is_allowed(known, "nobody", "")


def test_analysing_answers_with_a_page_or_one_line() -> None:
    def analyse(request: FusionRequest, view: View, hear: Any) -> tuple[str, str]:
        if request.style == "bad":
            raise KloraError("two\nlines of <b>")
        return f"page for {view.steps}", "rule"

    assert list(ui.answer(analyse, {"subject": "a", "style": "b"}, View(7)))[-1] == ("page for 7", "rule")
    *_, (said, rule) = ui.answer(analyse, {"subject": "a", "style": "bad"}, View())
    assert "two lines of &lt;b&gt;" in said
    assert 'role="alert"' in said
    assert rule == ""
    assert "Choose a style LoRA" in list(ui.answer(analyse, {"subject": "b", "style": "None"}, View()))[-1][0]


def test_an_analysis_tells_of_a_fault_without_folders(caplog: pytest.LogCaptureFixture) -> None:
    def analyse(request: FusionRequest, view: View, hear: Any) -> tuple[str, str]:
        raise PermissionError(13, "Permission denied", "/home/me/loras/dog.safetensors")

    *_, (said, _) = ui.answer(analyse, {"subject": "a", "style": "b"}, View())
    assert "an unexpected PermissionError: Permission denied" in said
    assert "/home" not in said
    assert "/home/me/loras" in caplog.text


def test_an_analysis_tells_how_far_it_is_and_can_be_cancelled() -> None:
    def analyse(request: FusionRequest, view: View, hear: Any) -> tuple[str, str]:
        for done in itertools.count():
            hear(done, 722)
            time.sleep(0.01)
        raise AssertionError

    running: list[AnalysisRun] = []
    shown = ui.answer(analyse, {"subject": "dog", "style": "<ink>"}, View(), running)
    assert re.search(r"scoring.*dog × %3Cink%3E: \d+ / 722", str(next(shown)))
    (one,) = running
    one.cancel()
    assert "cancelled" in str([*shown][-1])
    assert running == []


@pytest.mark.parametrize("with_filename", [True, False])
def test_callbacks_are_registered_each_time_and_without_a_stack_walk_where_possible(
    monkeypatch: pytest.MonkeyPatch, with_filename: bool
) -> None:
    events = (
        "before_ui",
        "ui_settings",
        "app_started",
        "infotext_pasted",
        "cfg_denoiser",
        "model_loaded",
        "script_unloaded",
    )
    seen: list[tuple[str, Any]] = []
    callbacks = types.ModuleType("modules.script_callbacks")
    callbacks.callback_map = {f"callbacks_{event}": [] for event in events}  # type: ignore[attr-defined]

    def add_callback(listed: Any, fun: Any, *, name: Any = None, category: str = "", filename: Any = None) -> None:
        assert filename
        seen.append((category, fun))

    for event in events:
        setattr(callbacks, f"on_{event}", lambda fun, event=event: seen.append((event, fun)))
    if with_filename:
        callbacks.add_callback = add_callback  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modules", types.ModuleType("modules"))
    monkeypatch.setitem(sys.modules, "modules.script_callbacks", callbacks)
    register.register()
    assert {event for event, _ in seen} == {*events}
    once = len(seen)
    register.register()
    assert len(seen) == 2 * once
