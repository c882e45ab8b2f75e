"""CUDA: where plans become blocks that the native execute stage can launch, and that stage itself."""

from __future__ import annotations

import ctypes
from functools import cache

from jax_nat import ffi_abi, handler
from jax_nat.ffi_abi import CallFrame
from jax_nat.flat_plan import MESSAGES, FlatPlan, PlanTable
from jax_nat.gate import guarded
from jax_nat.spec import Spec

_table = PlanTable()
_WORKSPACE_MESSAGE = ctypes.create_string_buffer(f"natcore: {handler.WORKSPACE_MESSAGE}".encode())


#: What programs are planned for where there is no GPU (`jax.export` for CUDA on a CPU machine). A GPU that
#: needs another workspace refuses such a program.
_ASSUMED_ARCH = "sm_90a"


def workspace_bytes(spec: Spec) -> int:
    """What the plan for this machine's first GPU needs."""
    from natcore.backends import cuda

    facts = cuda.facts(0) if cuda.device_count() else cuda.facts_for_arch(_ASSUMED_ARCH)
    return cuda.plan_for(spec.call, facts, spec.config).workspace_bytes


def instantiate(frame: CallFrame) -> None:
    """Compiles and loads the call's kernels for the first GPU; others are prepared when they first run it."""
    from natcore.backends import cuda

    if cuda.device_count():
        _add(handler.spec_of(frame), 0)


def _prepare_missing(frame: CallFrame) -> None:
    """Called by the native stage for a call that is not in the table."""
    _add(handler.spec_of(frame), ffi_abi.device_ordinal(frame))


def _add(spec: Spec, device: int) -> None:
    from natcore.backends import cuda

    if (spec.key, device) not in _table:
        loaded = cuda.load_plan(spec.call, device, spec.config)
        _table.add(FlatPlan(loaded.plan, loaded.kernels, spec, device))


@cache
def execute_stage() -> int:
    """The address of the execute stage's C handler: native, holding no GIL."""
    from jax_nat.numba_handler import compile_handler

    return compile_handler(
        cell=_table.cell,
        prepare=guarded(_prepare_missing),
        cu_launch=ffi_abi.address_of(ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx),
        workspace_message=ctypes.addressof(_WORKSPACE_MESSAGE),
        messages=ctypes.addressof(_messages()),
    )


@cache
def _messages() -> ctypes.Array:
    """A C array of messages, by CUresult, built before anything can fail."""
    from natcore.device import driver

    cuda = driver()
    texts = [b"natcore: a kernel launch failed with an unknown CUDA error"] * MESSAGES
    for code in cuda.CUresult:
        name, text = cuda.cuGetErrorName(code)[1], cuda.cuGetErrorString(code)[1]
        if 0 <= int(code) < MESSAGES:
            texts[int(code)] = b"natcore: a kernel launch failed: " + (name or b"") + b": " + (text or b"")
    return (ctypes.c_char_p * MESSAGES)(*texts)
