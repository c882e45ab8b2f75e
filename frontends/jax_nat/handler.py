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
from jax_nat.gate import guarded
from jax_nat.spec import Source, Spec
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
_CPU = Device("cpu")
_prepared: dict[int, tuple[Spec, Executable]] = {}  # on the CPU, by key


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
        needed = backends.prepare(spec.call, _CPU, spec.config).workspace_bytes
    else:
        from jax_nat import native

        needed = native.workspace_bytes(spec)
    return needed + ALIGNMENT - 1 if needed else 0


def spec_of(frame: CallFrame) -> Spec:
    return Spec.parse(ffi_abi.text_attribute(frame, _SPEC))


def _prepare_on_cpu(frame: CallFrame) -> tuple[Spec, Executable]:
    key = ffi_abi.integer_attribute(frame, _KEY)
    found = _prepared.get(key)
    if found is None:
        spec = spec_of(frame)
        found = _prepared[key] = (spec, backends.prepare(spec.call, _CPU, spec.config))
    return found


def _execute_on_cpu(frame: CallFrame) -> None:
    spec, executable = _prepare_on_cpu(frame)
    pointers = [0 if source is None else _address(frame, source) for source in spec.sources]
    executable(pointers, spec.scale, workspace=_workspace(frame, spec, executable.workspace_bytes))


def _address(frame: CallFrame, source: Source) -> int:
    group = frame.rets if source.is_result else frame.args
    return (group.buffers[source.buffer].contents.data or 0) + source.offset


def _workspace(frame: CallFrame, spec: Spec, needed: int) -> int:
    """The aligned address of the workspace, 0 where none is needed."""
    if not needed:
        return 0
    given = frame.rets.buffers[spec.results].contents if frame.rets.size > spec.results else None
    if given is None or given.dims[0] < needed + ALIGNMENT - 1:
        raise RuntimeError(WORKSPACE_MESSAGE)
    return -(-given.data // ALIGNMENT) * ALIGNMENT


def _cpu_stages() -> dict[str, int]:
    return {"instantiate": guarded(_prepare_on_cpu), "execute": guarded(_execute_on_cpu)}


def _cuda_stages() -> dict[str, int]:
    from jax_nat import native

    return {"instantiate": guarded(native.instantiate), "execute": native.execute_stage()}
