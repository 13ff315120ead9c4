"""Many small tasks at once: a thread for each core, and in each thread torch on one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from klora.late import torch

MAX_WORKERS = 4
"""Threads; one that scores holds some 10 MB."""


@contextmanager
def single_threaded_pool(tasks: int) -> Iterator[ThreadPoolExecutor]:
    """Python threads for `tasks` tasks, one or more, in which torch computes with one thread, elsewhere as before.

    They are as many as torch's own, at most `MAX_WORKERS`.
    """
    threads = torch.get_num_threads()
    size = min(threads, tasks, MAX_WORKERS)
    pool, started = ThreadPoolExecutor(size), threading.Barrier(size)

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # makes the number this thread's own
        started.wait()

    try:
        for worker in [pool.submit(start) for _ in range(size)]:
            worker.result()
        # Threads that are yet to come would inherit the 1.
        torch.set_num_threads(threads)
        yield pool
    finally:
        started.abort()  # nobody waits for a thread that could not be started
        torch.set_num_threads(threads)
        pool.shutdown(cancel_futures=True)
