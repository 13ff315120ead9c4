"""The accordion on the page of a real WebUI, used by a browser, wide and narrow, light and dark."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.hosts_real.server import Server
from tests.support.browser import drive

LIMIT_S = 1500
HARMLESS = "reading 'props'"
"""What A1111's own page throws where a width or height is typed."""


@pytest.fixture(scope="module")
def seen(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a browser saw on one walk through the page; its pictures go where KLORA_PAGE_PICTURES says."""
    kept = os.environ.get("KLORA_PAGE_PICTURES")
    folder = Path(kept, server.kind) if kept else tmp_path_factory.mktemp("pictures")
    folder.mkdir(parents=True, exist_ok=True)
    other = server.sdxl_model.path.stem if server.sdxl_model else ""
    try:
        found: dict[str, Any] = drive(
            Path(__file__).with_name("drive.py"), server.port, str(folder), other, limit_s=LIMIT_S
        )
    finally:
        server.options(sd_model_checkpoint=server.model.path.name)
    return found


def of_klora(infotext: str) -> dict[str, str]:
    """What a picture's text says of K-LoRA."""
    return dict(re.findall(r'K-LoRA ([\w ]+): ("[^"]*"|[^,]+)', infotext))


def test_the_checkbox_of_the_header_is_apart_from_the_fold(seen: dict[str, Any]) -> None:
    on = "K-LoRA · no pair yet"
    assert seen["header"] == [["K-LoRA", False, False], ["K-LoRA", False, True], [on, True, True], [on, True, False]]


def test_enabled_without_a_pair_is_off(seen: dict[str, Any]) -> None:
    assert of_klora(seen["no pair"]) == {}
    assert "<klora" not in seen["no pair"]
    assert "Choose a subject and a style first" in seen["no grid"]


def test_a_chosen_pair_is_named_analysed_and_its_map_pointed_at(seen: dict[str, Any]) -> None:
    assert seen["title"] == "K-LoRA · subj × style"
    assert "4 steps" in seen["analysis"]
    assert "Overlap: mostly apart" in seen["analysis"]
    assert re.search(r" — step 2/4: (subject|style)$", seen["pointed at"])


def test_a_picture_is_made_with_what_is_set(seen: dict[str, Any]) -> None:
    assert seen["stale"] == [1, 1]
    assert "<klora:subj:style:balance=0.5>" in seen["picture"]
    assert of_klora(seen["picture"])["balance"] == "0.5"


def test_a_side_of_several_is_set_by_menus_and_weights(seen: dict[str, Any]) -> None:
    assert seen["side"] == ["subj*0.8 + subj_te*0.5", "K-LoRA · subj*0.8 + subj_te*0.5 × style"]
    made = of_klora(seen["picture of several"])
    assert (made["subject to"], made["style blocks"]) == ("0.75", '"mid: 0.5"')
    assert all(name in seen["picture of several"] for name in ("subj: ", "subj_te: ", "style: "))


def test_a_picture_s_text_is_pasted_back_whole(seen: dict[str, Any]) -> None:
    assert seen["pasted"] == {
        "subject": "subj*0.8 + subj_te*0.5",
        "style": "style",
        "subject_to": "0.75",
        "style_blocks": "mid: 0.5",
        "balance": "0.5",
        "handle": "0.75",
        "rows": 2,
        "on": False,
    }
    # Forge Neo leaves the whole text in the prompt, with or without K-LoRA.
    made, again = (seen[name].splitlines() for name in ("picture of several", "picture of the pasted"))
    assert (again[0], again[-1]) == (made[0], made[-1])


def test_a_fusion_of_sides_is_saved_once_and_listed(seen: dict[str, Any]) -> None:
    assert seen["no file"] == ["This policy depends on the step, which no file can hold", False]
    assert "both of them is among the LoRAs now" in seen["saved"]
    assert "both of them.safetensors is there already" in seen["saved again"]
    assert seen["listed"] == "both of them"


def test_five_balances_are_one_grid_and_leave_the_plot_as_it_was(seen: dict[str, Any]) -> None:
    assert "X Type: [K-LoRA] Judged share" in seen["grid"]
    before, after = seen["script after the grid"]
    assert before == after


def test_a_map_is_no_picture_of_a_batch_of_img2img(seen: dict[str, Any]) -> None:
    assert len(seen["batch"]) == 2, seen["batch"]


def test_a_pair_for_another_checkpoint_is_named_in_words(server: Server, seen: dict[str, Any]) -> None:
    if server.sdxl_model is None:
        pytest.skip("no SDXL checkpoint")
    assert "this pair is for SD 1, the checkpoint is SDXL" in seen["misfit"]


def test_the_settings_are_grouped_and_labelled(seen: dict[str, Any]) -> None:
    for text in ("Maps and scores", "Reference pictures", "What the accordion begins with", "Subject strength"):
        assert text in seen["settings"]


def test_nothing_stands_out_of_the_accordion_in_any_look(seen: dict[str, Any]) -> None:
    assert {look: found["out"] for look, found in seen["looks"].items()} == {look: [] for look in seen["looks"]}


def test_the_page_has_no_errors_of_ours(seen: dict[str, Any]) -> None:
    errors = [*seen["errors"], *(error for look in seen["looks"].values() for error in look["errors"])]
    assert [error for error in errors if HARMLESS not in error] == []
