"""How much memory a piece of Python allocates."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Iterator


@contextlib.contextmanager
def allocates_less_than(limit: int) -> Iterator[None]:
    """Fail where what is done within holds `limit` bytes or more of Python's memory at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
