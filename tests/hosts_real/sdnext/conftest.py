"""One SD.Next for all tests, and after every test a look whether anything was left behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.hosts_real.sdnext.server import SdnextServer, find_sdnext
from tests.hosts_real.server import Picture


@pytest.fixture(scope="session")
def sdnext(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SdnextServer]:
    """A running SD.Next; the test is skipped where there is none."""
    found = find_sdnext(tmp_path_factory.mktemp("sdnext"))
    if isinstance(found, str):
        pytest.skip(found)
    try:
        found.start()
        yield found
    finally:
        found.stop()


@pytest.fixture(scope="session")
def plain_of_sd(sdnext: SdnextServer) -> Picture:
    """The picture without any tag, made before anything else."""
    return sdnext.txt2img()


@pytest.fixture(scope="session")
def untouched(sdnext: SdnextServer, plain_of_sd: Picture) -> dict[str, Any]:
    """What that model is like before anything else."""
    return sdnext.state()


@pytest.fixture
def plain(sdnext: SdnextServer, plain_of_sd: Picture) -> Picture:
    """The same, with its model loaded."""
    sdnext.use("sd")
    return plain_of_sd


@pytest.fixture(autouse=True)
def nothing_left(sdnext: SdnextServer, plain_of_sd: Picture, untouched: dict[str, Any]) -> Iterator[None]:
    """After every test: no hook, the plain picture the same as ever, and then every weight as it was."""
    yield
    # Text encoders of transformers put hooks of their own on.
    assert sdnext.state()["denoiser"]["hooks"] == untouched["denoiser"]["hooks"]
    sdnext.use("sd")
    # The host takes its own LoRAs out when the next picture begins.
    assert sdnext.txt2img().same(plain_of_sd)
    assert sdnext.state() == untouched
