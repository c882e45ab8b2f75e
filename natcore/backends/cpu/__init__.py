"""Executables on the host: first version, through the reference."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from natcore import reference
from natcore.problem import RESULTS, Call
from natcore.views import ITEM_SIZES, Device


def _array(pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        import ml_dtypes

        kind = np.dtype(ml_dtypes.bfloat16)
    else:
        kind = np.dtype(dtype)
    if 0 in shape:
        return np.empty(shape, kind)
    item = ITEM_SIZES[dtype]
    low = sum((n - 1) * min(s, 0) for n, s in zip(shape, strides, strict=True))
    high = sum((n - 1) * max(s, 0) for n, s in zip(shape, strides, strict=True)) + 1
    memory = (ctypes.c_char * ((high - low) * item)).from_address(pointer + low * item)
    return np.ndarray(shape, kind, memory, -low * item, [s * item for s in strides])


class CpuExecutable:
    workspace_bytes = 0

    def __init__(self, call: Call):
        self.call = call

    def __call__(self, pointers: Sequence[int], scale: float, stream: int = 0, workspace: int = 0) -> None:
        call, problem = self.call, self.call.problem
        arrays = {
            name: None if strides is None else _array(p, problem.shapes[name], strides, problem.dtype_of(name))
            for name, p, strides in zip(call.operands, pointers, call.strides, strict=True)
        }
        options = {name: arrays[name] for name in ("rpb", "additional_keys", "additional_values")}
        inputs = [arrays[name] for name in "qkv"]
        if call.direction == "forward":
            results = reference.forward(*inputs, problem.window, scale=scale, **options)
        else:
            options["d_lse"] = arrays["d_lse"]
            results = reference.backward(arrays["d_out"], *inputs, problem.window, scale=scale, **options)
        for name, value in zip(RESULTS[call.direction], results, strict=True):
            if arrays[name] is not None:
                arrays[name][...] = value


class CpuBackend:
    def prepare(self, call: Call, device: Device, config: object = None) -> CpuExecutable:
        if config is not None:
            raise NotImplementedError(f"config {config!r}: the CPU backend has one kernel and takes none; pass None.")
        return CpuExecutable(call)


BACKEND = CpuBackend()
