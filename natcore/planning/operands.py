"""What the tensor core kernels have in common: the operands that they take, and how these lie in memory."""

from __future__ import annotations

import struct

from natcore.planning.plan import DeviceFacts, capability
from natcore.problem import OPERANDS, Call
from natcore.views import ITEM_SIZES

MAX_HEAD_DIM = 128
_ROWS = ("d_out", "q", "k", "v", "out", "dq", "dk", "dv")  # whose last axis is copied 16 bytes at a time


def alignment(name: str) -> int:
    """Bytes that the address of an operand must be a multiple of; 1 = its dtype's own."""
    return 16 if name in _ROWS else 1


def strides_of(call: Call, name: str) -> tuple[int, tuple[int, ...], int] | None:
    """The strides of an operand by batch entry, axis and head; None where it is absent."""
    strides = call.strides[OPERANDS[call.direction].index(name)]
    if strides is None:
        return None
    if name in ("rpb", "drpb"):
        return 0, strides[1:], strides[0]
    if name in ("lse", "d_lse"):
        return strides[0], strides[1:-1], strides[-1]
    return strides[0], strides[1:-2], strides[-2]


def layout_of_two_axes(call: Call, name: str) -> bytes:
    """struct Layout, of the kernels of two-dimensional maps, of one operand; of absent ones, zeros."""
    strides = strides_of(call, name)
    if strides is None:
        return bytes(32)
    batch, axis, head = strides
    step = [s * d for s, d in zip(axis, call.problem.window.dilation, strict=True)]
    return struct.pack("=q5i4x", batch, head, *axis, *(axis if name in ("rpb", "drpb") else step))


def refusal_of_elements(call: Call, facts: DeviceFacts, kernel: str, float32: bool = False) -> str | None:
    """Why a tensor core kernel, of 16-bit elements or of ``float32`` too, cannot take a call's rows, or None."""
    p = call.problem
    if capability(facts.arch) < 80:
        return f"{facts.arch} is too old; the {kernel} kernel runs on sm_80 and later."
    if ITEM_SIZES[p.dtype] != 2 and not (float32 and p.dtype == "float32"):
        return f"dtype {p.dtype}: the {kernel} kernel takes {'float32, ' if float32 else ''}float16 and bfloat16."
    if p.head_dim % 8 or p.head_dim_v % 8 or max(p.head_dim, p.head_dim_v) > MAX_HEAD_DIM:
        return f"head_dim {p.head_dim}, head_dim_v {p.head_dim_v}: multiples of 8 up to {MAX_HEAD_DIM} are supported."
    return None


def refusal_of_strides(call: Call, limit: int, beyond: str, first: int = 0) -> str | None:
    """Why a tensor core kernel cannot take a call's strides, or None: rows of 16-byte chunks, and all strides from
    axis ``first`` on below ``limit``."""
    p = call.problem
    chunk = 16 // ITEM_SIZES[p.dtype]
    for name, strides in zip(call.operands, call.strides, strict=True):
        if strides is None:
            continue
        odd = [s for s, n in zip(strides[:-1], p.shapes[name][:-1], strict=True) if n > 1 and s % chunk]
        if name in _ROWS and (strides[-1] != 1 or odd):
            return f"{name} has strides {strides}: all but the last must be multiples of {chunk}, and that 1."
        if max(abs(s) * max(p.window.dilation) for s in strides[first:]) >= limit:
            return f"{name} has strides {strides}, beyond {beyond}."
    return None
