"""Sharing out work over the processor's cores: kernels release the GIL, so plain threads do.

The calling thread works too, so a call never waits for a worker that is busy with another call.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def worker_count() -> int:
    """The cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _workers() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, worker_count() - 1), thread_name_prefix="natcore")
        return _pool


def _forget_workers() -> None:
    """Threads do not survive a fork: the child makes its own when it first needs them."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


def run_all(work: Callable[[], Callable[[int], None]], number: int) -> None:
    """Runs pieces 0 ... number - 1. Every worker calls ``work()`` once and what it returns per piece."""
    pieces = count()

    def run() -> None:
        run_piece = None
        while (piece := next(pieces)) < number:
            run_piece = run_piece or work()
            run_piece(piece)

    helpers = min(worker_count(), number) - 1
    futures = [_workers().submit(run) for _ in range(helpers)]
    try:
        run()
    finally:
        for future in futures:
            if not future.cancel():
                future.result()
