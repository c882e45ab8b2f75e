"""The XLA FFI target: instantiate prepares a call, execute runs it. One bundle per platform.

On the CPU both stages are Python. On CUDA execute is native (`jax_nat.native`) and comes back to Python
only for a call that this process has not prepared: a hit in the persistent compilation cache and a
deserialized program never run instantiate, so execute rebuilds from the `Spec` in the attributes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from functools import lru_cache

import jax
import jax.ffi

from jax_nat import ffi_abi
from jax_nat.ffi_abi import CallFrame
from jax_nat.flat_plan import ALIGNMENT
from jax_nat.spec import Spec
from natcore import backends
from natcore.backends import Executable
from natcore.views import Device

TARGET = "natcore_neighborhood_attention"
PLATFORMS = ("cpu", "cuda")

WORKSPACE_MESSAGE = (
    "this program's workspace is too small here: it was compiled for another kind of device. Compile it for this one."
)
_KEY, _SPEC = 0, 1  # the attributes, in the order of their names

_lock = threading.Lock()
_registered: set[str] = set()
_prepared: dict[tuple[int, Device], tuple[Spec, Executable]] = {}


def register(platform: str) -> None:
    """Makes the target known to XLA for "cpu" or "cuda"; once per process.

    Without the CUDA driver nothing can run there, and nothing is registered; programs can still be lowered
    and exported for it.
    """
    with _lock:
        if platform in _registered or (platform == "cuda" and not _has_driver()):
            return
        stages = _cuda_stages() if platform == "cuda" else _cpu_stages()
        capsules = {name: jax.ffi.pycapsule(address) for name, address in stages.items()}
        jax.ffi.register_ffi_target(TARGET, capsules, platform="CUDA" if platform == "cuda" else platform)
        _registered.add(platform)


def register_where_possible() -> None:
    """At import: programs from `jax.export` need the target though nothing is lowered here."""
    register("cpu")
    platforms = (getattr(jax.config, "jax_platforms", None) or "cuda").split(",")
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if {"cuda", "gpu"} & set(platforms) and any(importlib.util.find_spec(name) for name in plugins):
        register("cuda")


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@lru_cache(maxsize=4096)
def workspace_bytes(platform: str, spec: Spec) -> int:
    """Size of the workspace result, with room to align it. Raises as `natcore.backends.prepare` does."""
    if platform == "cpu":
        needed = backends.prepare(spec.call, Device("cpu"), spec.config).workspace_bytes
    else:
        from jax_nat import native

        needed = native.workspace_bytes(spec)
    return needed + ALIGNMENT - 1 if needed else 0


def spec_of(frame: CallFrame) -> Spec:
    return Spec.parse(ffi_abi.text_attribute(frame, _SPEC))


def prepared(frame: CallFrame, device: Device) -> tuple[Spec, Executable]:
    """What this call runs on a device, remembered by its key."""
    place = (ffi_abi.integer_attribute(frame, _KEY), device)
    found = _prepared.get(place)
    if found is None:
        spec = spec_of(frame)
        found = _prepared[place] = (spec, backends.prepare(spec.call, device, spec.config))
    return found


def execute(frame: CallFrame, device: Device, stream: int = 0) -> None:
    """Runs one call from Python."""
    spec, executable = prepared(frame, device)
    pointers = [
        0
        if source is None
        else ((frame.rets if source.is_result else frame.args).buffers[source.buffer].contents.data or 0)
        + source.offset
        for source in spec.sources
    ]
    executable(pointers, spec.scale, stream, _workspace(frame, spec, executable.workspace_bytes))


def _workspace(frame: CallFrame, spec: Spec, needed: int) -> int:
    if not needed:
        return 0
    given = frame.rets.buffers[spec.results].contents if frame.rets.size > spec.results else None
    size = 0 if given is None else given.dims[0]
    if given is None or size < needed + ALIGNMENT - 1:
        raise RuntimeError(f"{WORKSPACE_MESSAGE} ({size} bytes, here {needed + ALIGNMENT - 1})")
    return -(-given.data // ALIGNMENT) * ALIGNMENT


def _cpu_stages() -> dict[str, int]:
    cpu = Device("cpu")
    return {
        "instantiate": ffi_abi.guarded(lambda frame: prepared(frame, cpu)),
        "execute": ffi_abi.guarded(lambda frame: execute(frame, cpu)),
    }


def _cuda_stages() -> dict[str, int]:
    from jax_nat import native

    return {"instantiate": ffi_abi.guarded(native.instantiate), "execute": native.execute_stage()}
