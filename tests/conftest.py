"""What holds for all tests: caches of their own, no network, quiet libraries, one thread, no deadlines."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A machine may be busy with other things: how long an example takes says nothing about it.
settings.register_profile("klora", deadline=None)
# The same few examples each time: thousands of mutants are tried with them (docs/mutation.md).
settings.register_profile("mutation", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("klora")


def pytest_configure() -> None:
    """Keep every hub out of the tests: its library reads this once, when a test module first imports it."""
    os.environ.update(
        HF_HUB_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        TRANSFORMERS_VERBOSITY="error",
        DIFFUSERS_VERBOSITY="error",
        OMP_NUM_THREADS="1",
    )
    # Tiny models are far slower on several threads, above all on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def frozen() -> Iterator[None]:
    """Keep what imports have made out of the rounds of the garbage collector: these took an eighth of the time."""
    yield
    if len(gc.get_objects()) > 100_000:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the user's cache out of the tests; gives the folder that stands for it."""
    folder = tmp_path_factory.mktemp("user-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder
