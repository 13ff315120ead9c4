"""The accordion in a bare Gradio app, used by a browser; each Gradio in a small environment of its own (`.ci/run`)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import find_chromium

HERE = Path(__file__).parent
START_S = 120


@pytest.fixture(scope="module", params=["KLORA_GRADIO3_PYTHON", "KLORA_GRADIO4_PYTHON"])
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What a browser saw in the app, once for each Gradio."""
    python = os.environ.get(request.param)
    chromium = find_chromium()
    if not python:
        pytest.skip(f"{request.param} names no environment with Gradio and playwright")
    port = free_port()
    log = tmp_path_factory.mktemp("gradio") / "log"
    with open(log, "w") as stream:
        server = subprocess.Popen([python, str(HERE / "serve.py"), str(port)], stdout=stream, stderr=stream)
    try:
        wait_for(port, server, log)
        run = subprocess.run(
            [python, str(HERE / "drive.py"), f"http://127.0.0.1:{port}/", chromium],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert run.returncode == 0, run.stderr[-3000:] + log.read_text()[-3000:]
        yield {**json.loads(run.stdout), "log": log.read_text()}
    finally:
        server.terminate()
        server.wait(30)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    pytest.fail(f"the app did not start: {log.read_text()[-3000:]}")


def test_it_is_off_and_all_default_at_first(seen: dict[str, Any]) -> None:
    from klora.webui.args import ARG_ORDER, read_args, read_values

    before = seen["before"]
    assert list(before) == list(ARG_ORDER)
    assert before["enabled"] is False
    assert before["subject"] == before["style"] == "None"
    assert read_args(list(before.values())) is None
    pair = {name: value for name, value in before.items() if name != "enabled"} | {"subject": "a", "style": "b"}
    assert not read_values(pair).settings.changed()


def test_the_title_tells_the_active_pair(seen: dict[str, Any]) -> None:
    assert seen["title"] == "K-LoRA"
    assert seen["active title"] == "K-LoRA · dog × ink"


def test_the_checkbox_in_the_header_is_apart_from_the_fold(seen: dict[str, Any]) -> None:
    assert seen["folded by the tick"] == [[True, True], [False, True], [True, True]]


def test_analysing_is_for_the_steps_of_the_tab_in_the_colours_of_the_page(seen: dict[str, Any]) -> None:
    assert seen["summary"] == "dog × ink, 24 steps, light"


def test_the_formula_shows_under_advanced_only(seen: dict[str, Any]) -> None:
    assert seen["rule"] == "S(τ) = 1.5·τ + 0.5"


def test_analysing_shows_an_error_as_text_and_no_map(seen: dict[str, Any]) -> None:
    assert seen["error"] == "there is no LoRA named <b>dog</b>; did you mean cat?"
    assert seen["map after error"] == 0


def test_what_is_pointed_at_is_told_and_an_analysis_holds_until_something_changes(seen: dict[str, Any]) -> None:
    assert seen["pointed at"] == "up block 0 · key — step 9/24: style"
    assert seen["stale at first"] == 0
    assert seen["opacity of the stale"] == [0.4, 0.4]


def test_a_pair_for_another_checkpoint_is_told_of_when_that_is_chosen(seen: dict[str, Any]) -> None:
    assert seen["misfit"] == [0, "dog and ink are not for flux"]


def test_the_share_is_a_slider_with_a_switch(seen: dict[str, Any]) -> None:
    assert seen["by share"] == "0.4"
    assert seen["by balance"] == "auto"


def test_labels_and_inputs_of_a_row_lie_on_one_line(seen: dict[str, Any]) -> None:
    rows: dict[int, list[dict[str, float]]] = {}
    for block in seen["rows"]:
        rows.setdefault(round(block["label"]), []).append(block)
    assert max(map(len, rows.values())) > 1
    for row in rows.values():
        assert max(block["input"] for block in row) - min(block["input"] for block in row) < 3


def test_what_is_set_reaches_the_script_and_refreshed_names_can_be_chosen(seen: dict[str, Any]) -> None:
    from klora.webui.args import read_args

    request = read_args(list(seen["after"].values()))
    assert request is not None
    assert (request.subject, request.style) == ("dog", "new")
    changed = {"balance": -0.5, "beta": 0.6, "policy": "random", "style_strength": 0.83}
    changed |= dict.fromkeys(("style_from", "style_to"), seen["windows"][1][1])
    assert request.settings.changed() == changed


def test_a_window_is_one_track_with_two_handles_that_do_not_pass_each_other(seen: dict[str, Any]) -> None:
    places, first, second, drawn = seen["windows"]
    assert places[:2] == places[2:]
    assert first == [0, pytest.approx(0.5, abs=0.051)]
    assert second[0] == second[1] == first[1]
    assert [float(end) for end in drawn] == second


def test_the_handle_that_the_keyboard_moves_is_marked_and_the_other_is_not(seen: dict[str, Any]) -> None:
    assert seen["focused handles"] == [[True, False], [False, True]]


def test_a_share_is_none_where_the_policy_takes_none(seen: dict[str, Any]) -> None:
    assert seen["after"]["share"] == "auto"


def test_each_lora_of_a_side_of_several_has_a_row_with_its_weight_in_any_language(seen: dict[str, Any]) -> None:
    assert seen["several"] == [0, "dog + ink", "dog + ink*0.5", "ink*0.5", ["ink", "None"]]


def test_nothing_stands_out_of_the_accordion_and_rows_are_even_on_a_wide_page_and_a_narrow_one(
    seen: dict[str, Any],
) -> None:
    for layout in seen["layouts"]:
        assert layout["out"] == []
        assert layout["balance"] == pytest.approx([0, 0], abs=2)
        assert layout["refresh"] == sorted(layout["refresh"])
        assert max(layout["gaps"]) - min(layout["gaps"]) <= 1
        assert layout["switch"] < 50


def test_tooltips_are_our_own_and_each_control_has_its_name(seen: dict[str, Any]) -> None:
    for layout in seen["layouts"]:
        assert {"Balance", "Set the share instead", "Subject strength", "Policy", "β"} <= set(layout["titles"])
        assert not {"Advanced", "Several LoRAs a side"} & set(layout["titles"])


def test_the_seed_shows_only_with_the_random_policy(seen: dict[str, Any]) -> None:
    assert seen["seed at first"] is False


def test_the_page_has_no_errors_and_needs_no_torch(seen: dict[str, Any]) -> None:
    assert seen["page errors"] == []
    assert seen["log"].startswith("no torch")
