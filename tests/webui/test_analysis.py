"""The analysis of a pair on a fake host: what it says, and that it never says where files lie."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from klora.errors import KloraError
from klora.webui import analysis, api
from klora.webui.args import read_values
from tests.support.lora_files import write_lora
from tests.support.pairs import ATTENTION, shapes
from tests.webui.fake_host import FakeHost
from tests.webui.hosts import host

__all__ = ["host"]

PAIR = {"subject": "dog", "style": "ink"}


def test_the_answer_names_files_without_their_folders(host: FakeHost) -> None:
    answer = api.analysis(PAIR)
    assert (answer["subject"]["file"], answer["style"]["file"]) == ("dog.safetensors", "ink.safetensors")
    assert str(host.folder) not in json.dumps(answer)


@pytest.mark.parametrize("fault", ["broken", "empty", "small"])
def test_an_error_names_files_without_their_folders(host: FakeHost, fault: str) -> None:
    path = host.folder / "ink.safetensors"
    if fault == "small":
        write_lora(path, shapes(ATTENTION, 16), rank=2)
    else:
        path.write_bytes(b"" if fault == "empty" else b"\x08\0\0\0\0\0\0\0{broken}")
    for analyse in (api.analysis, lambda values: analysis.plan_of(read_values(values))):
        with pytest.raises(KloraError, match=r"ink\.safetensors") as caught:
            analyse(PAIR)
        assert str(host.folder) not in str(caught.value)


def test_a_path_too_long_for_a_message_is_not_shown_in_part(host: FakeHost) -> None:
    folder: Path = host.folder
    for letter in "abc":
        folder /= letter * 100
    folder.mkdir(parents=True)
    (folder / "far.safetensors").touch()
    host.folder = folder
    with pytest.raises(KloraError) as caught:
        api.analysis({"subject": "far", "style": "far"})
    assert str(caught.value).startswith("far.safetensors: is empty")


def test_the_host_s_temporary_folder_is_there_for_the_map(host: FakeHost) -> None:
    pytest.importorskip("matplotlib")
    host.opts.temp_dir = str(host.folder / "new" / "tmp")
    analysis.gallery_map(analysis.plan_of(read_values(PAIR))[1], None)
    assert Path(host.opts.temp_dir).is_dir()
