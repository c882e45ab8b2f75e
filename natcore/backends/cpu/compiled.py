"""The kernels, compiled on first use and remembered by numba on disk for the next process."""

from __future__ import annotations

import hashlib
import os
import platform
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
from llvmlite.binding import get_host_cpu_features
from numba import njit

from natcore.backends.cpu import backward, forward, memory, unfused

_lock = threading.RLock()


def _hold() -> None:
    _lock.acquire()


def _release() -> None:
    _lock.release()


if hasattr(os, "register_at_fork"):  # a child must not inherit numba's compiler at work in another thread
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_release)


@lru_cache(maxsize=1)
def _digest() -> str:
    """Of all the sources here: numba only looks at the file of the function that it caches."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


_KERNELS = {
    "forward": forward.forward,
    "backward": backward.backward,
    "qk": unfused.qk,
    "qk_backward": unfused.qk_backward,
    "av": unfused.av,
    "av_backward": unfused.av_backward,
    "store_all": memory.store_all,
}


def check_host() -> None:
    """The kernels convert float16 in hardware; without it, LLVM would call functions that nobody brings."""
    if platform.machine().lower() in ("x86_64", "amd64") and not get_host_cpu_features().get("f16c"):
        raise NotImplementedError(
            "this processor has no F16C instructions, which natcore's CPU kernels need: they run on x86-64-v3 "
            "(2013 and later) and on 64-bit ARM. Use a GPU, or natcore.reference for small problems."
        )


@lru_cache(maxsize=16)
def kernel(name: str, dtype: str) -> Any:
    """A kernel, a function of (an address, a number), in arithmetic of ``dtype``, float32 or float64.

    Compiling takes seconds, reading what an earlier process compiled milliseconds. Where numba can
    keep nothing on disk it compiles for this process alone.
    """
    check_host()
    entry, types = _KERNELS[name](_digest()), (numba.types.int64, getattr(numba.types, dtype))
    with _lock:
        try:
            compiled = njit(cache=True, nogil=True, error_model="numpy")(entry)
            compiled.compile(types)
        except Exception:  # noqa: BLE001  no folder to write to, a full disk, a damaged cache
            compiled = njit(nogil=True, error_model="numpy")(entry)
            compiled.compile(types)
    return compiled
