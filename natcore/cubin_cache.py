"""The disk cache of compiled kernels: a folder of self-checking files.

Any number of processes may share it. A damaged entry counts as absent, and without a writable folder
everything works uncached, with one warning. Where all entries together grow beyond `LIMIT_BYTES`, those
that were used longest ago go.

An entry, ``<key>.cubin``, is sha256(rest) + rest, where rest is one line of JSON (key and resources)
followed by the cubin.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

LIMIT_BYTES = 1 << 30  # thousands of kernels
SCHEMA = 1  # part of every key: a change makes all older entries misses


@dataclass(frozen=True)
class Resources:
    """What one thread (registers, stack, spills) and one block (static shared memory) of a kernel take."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


@dataclass(frozen=True)
class Cubin:
    image: bytes
    resources: Resources | None  # None where the compiler gave no report


def cache_folder() -> Path:
    """$NATCORE_CACHE_DIR, or natcore in the user's cache folder. Raises RuntimeError without a home folder."""
    explicit = os.environ.get("NATCORE_CACHE_DIR")
    if explicit:
        return Path(explicit)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "natcore"


def read_entry(key: str) -> Cubin | None:
    """The entry of a key; None where it is absent, unreadable, damaged or another key's."""
    try:
        path = cache_folder() / f"{key}.cubin"
        data = path.read_bytes()
        digest, rest = data[:32], data[32:]
        if hashlib.sha256(rest).digest() != digest:
            return None
        head, _, image = rest.partition(b"\n")
        fields = json.loads(head)
        if fields["key"] != key:
            return None
        with contextlib.suppress(OSError):  # another user's folder
            os.utime(path)  # the time of its last use
        resources = fields["resources"]
        return Cubin(image, None if resources is None else Resources(**resources))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None


def write_entry(key: str, cubin: Cubin) -> None:
    """Written beside its place and moved there: no reader ever sees half of it."""
    head = json.dumps({"key": key, "resources": cubin.resources and asdict(cubin.resources)}).encode()
    rest = head + b"\n" + cubin.image
    temporary = None
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(rest).digest() + rest)
        os.replace(temporary, folder / f"{key}.cubin")
        _evict(folder)
    except (OSError, RuntimeError) as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        _warn_uncached(type(error).__name__, str(error))


def _evict(folder: Path) -> None:
    """Removes what was used longest ago, and what writers that died left, until the folder is nine tenths full.

    Without a lock: another process may have removed a file before us, or read it just then, which costs a
    compilation at most.
    """
    entries = []
    for path in [path for path in folder.iterdir() if path.suffix in (".cubin", ".tmp")]:
        with contextlib.suppress(FileNotFoundError):
            facts = path.stat()
            entries.append((facts.st_mtime, facts.st_size, path))
    total = sum(size for _, size, _ in entries)
    if total <= LIMIT_BYTES:
        return
    for _, size, path in sorted(entries):
        if total <= LIMIT_BYTES * 9 // 10:
            return
        with contextlib.suppress(OSError):  # gone already, or (on Windows) being read
            path.unlink()
        total -= size


@lru_cache
def _warn_uncached(kind: str, message: str) -> None:
    """Once for each reason."""
    warnings.warn(
        f"natcore cannot write its kernel cache ({kind}: {message}); every process compiles its kernels anew. "
        "Set NATCORE_CACHE_DIR to a writable folder.",
        RuntimeWarning,
        stacklevel=2,
    )
