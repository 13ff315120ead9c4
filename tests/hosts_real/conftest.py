"""One server per host, and after every test a look whether anything was left behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.hosts_real.server import HOSTS, Picture, Server, find_server


@pytest.fixture(scope="session", params=HOSTS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running host; the test is skipped where there is none."""
    found = find_server(request.param, tmp_path_factory.mktemp(request.param))
    if isinstance(found, str):
        pytest.skip(found)
    try:
        found.start()
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="session")
def plain(server: Server) -> Picture:
    """The picture without any tag, made before anything else."""
    return server.txt2img()


@pytest.fixture(scope="session")
def untouched(server: Server, plain: Picture) -> dict[str, Any]:
    """What the model is like before anything else."""
    return server.state()


@pytest.fixture(autouse=True)
def nothing_left(server: Server, plain: Picture, untouched: dict[str, Any]) -> Iterator[None]:
    """After every test: no hook, then a plain picture that is the same as ever, and every parameter as it was."""
    yield
    assert server.hooks() == {name: untouched[name]["hooks"] for name in ("unet", "text")}
    assert server.txt2img().same(plain)
    assert server.state() == untouched
