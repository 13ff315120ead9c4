"""What the host is told of each control when a text is pasted."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from klora.webui.infotext import PASTERS
from klora.webui.paste import FIELDS


@pytest.fixture(autouse=True)
def gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(update=dict))


def test_controls_are_told_updates_which_every_host_takes_from_a_function() -> None:
    params = {"Prompt": "a dog <klora:dog:ink:balance=0.5>"}
    assert FIELDS["balance"](params) == {"value": 0.5}
    assert FIELDS["enabled"](params) == {"value": False}
    assert {name: update(params)["value"] for name, update in FIELDS.items()} == {
        name: paste(params) for name, paste in PASTERS.items()
    }


def test_a_text_without_a_tag_changes_no_control() -> None:
    assert {update({"Prompt": "a dog"}) for update in FIELDS.values()} == {None}
