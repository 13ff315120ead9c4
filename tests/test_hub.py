"""Where models come from: folders, the hub, or what is kept of it; and that no one waits long for a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from klora import hub
from klora.errors import KloraError
from klora.hub import ModelSource, find_model

ASK = """
import json, time
import huggingface_hub, huggingface_hub.utils  # importing is not waiting
from klora.errors import KloraError
from klora.hub import find_model
start = time.perf_counter()
try:
    source = find_model("owner/name")
    found = [source.name, source.local_files_only]
except KloraError as error:
    found = str(error)
print(json.dumps([found, time.perf_counter() - start]))
"""


def ask(endpoint: str, cache: Path, **environment: str) -> Any:
    """What `find_model` says of owner/name in a process of its own, and after how many seconds."""
    hub_of_its_own = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        env={**os.environ, **hub_of_its_own, **environment},
        cwd=Path(hub.__file__).parent.parent,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


@contextmanager
def hub_at_hand(status: int | None) -> Iterator[tuple[str, list[str]]]:
    """A hub's address and what it was asked; it answers all with `status`, or nothing at all."""
    asked: list[str] = []
    over = Event()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            if status is None:
                over.wait()
                return
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serving = Thread(target=server.serve_forever)
    serving.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        over.set()
        server.shutdown()
        serving.join()
        server.server_close()


def keep(cache: Path) -> None:
    """Lay owner/name where the hub's library keeps its models."""
    model = cache / "models--owner--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc")
    (model / "snapshots" / "abc").mkdir(parents=True)
    (model / "snapshots" / "abc" / "config.json").write_text("{}")


def test_a_folder_is_loaded_from_its_files_alone(tmp_path: Path) -> None:
    assert find_model(str(tmp_path)) == ModelSource(str(tmp_path), local_files_only=True)


@pytest.mark.parametrize("name", ["nowhere", "/no/where", "a/b/c", "https://a/b", "~nobody-here/model"])
def test_what_is_no_hub_id_is_refused_without_asking(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hub_answers", lambda: pytest.fail("asked"))
    with pytest.raises(KloraError, match=r"not a hub id either\); give a folder"):
        find_model(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "a.bin").touch()
    with pytest.raises(KloraError, match="it is a file"):
        find_model(str(tmp_path / "a.bin"))


@pytest.mark.parametrize("status", [200, 404, 503])
def test_a_hub_that_gives_any_answer_is_there(status: int, tmp_path: Path) -> None:
    with hub_at_hand(status) as (endpoint, asked):
        found, _ = ask(endpoint, tmp_path)
    assert found == ["owner/name", False]
    assert len(asked) == 1


def test_a_hub_that_is_silent_is_asked_once_and_given_up_within_three_seconds(tmp_path: Path) -> None:
    with hub_at_hand(None) as (endpoint, asked):
        found, seconds = ask(endpoint, tmp_path)
    assert found.startswith("owner/name: cannot be loaded (there is no such folder, and the hub does not answer)")
    assert len(asked) == 1
    assert seconds < 3


def test_a_hub_that_cannot_be_reached_is_given_up_at_once_and_what_is_kept_of_it_used(tmp_path: Path) -> None:
    keep(tmp_path)
    found, seconds = ask("http://127.0.0.1:9", tmp_path)
    assert found == ["owner/name", True]
    assert seconds < 3


def test_no_hub_is_asked_where_the_user_forbids_it(tmp_path: Path) -> None:
    with hub_at_hand(200) as (endpoint, asked):
        found, _ = ask(endpoint, tmp_path, HF_HUB_OFFLINE="1")
    assert "the hub does not answer" in found
    assert asked == []
