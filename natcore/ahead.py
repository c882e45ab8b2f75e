"""Kernels of calls that are to come, compiled side by side: all in the time of the slowest."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from natcore.problem import OPERANDS, Call, Direction, Problem, call_of
from natcore.views import Device, View, contiguous_strides

_PACKED = ("q", "k", "v", "dq", "dk", "dv")


def packed_call(direction: Direction, problem: Problem, with_lse: bool) -> Call:
    """The call on q, k and v (and on their gradients) in one contiguous ``[batch, *spatial, 3, heads, head_dim]``, all
    else contiguous by itself; without d_lse."""
    whole = contiguous_strides((problem.batch, *problem.spatial, 3, problem.heads, problem.head_dim))
    absent = {"d_lse"} if with_lse else {"d_lse", "lse"}
    views: dict[str, View | None] = {}
    for name in OPERANDS[direction]:
        shape = problem.shapes[name]
        strides = (*whole[:-3], *whole[-2:]) if name in _PACKED else contiguous_strides(shape)
        present = problem.has(name) and name not in absent
        views[name] = View(0, shape, strides, problem.dtype_of(name), Device("cpu")) if present else None
    return call_of(direction, problem, views)


def load_kernels(problems: Iterable[Problem], device_index: int, with_lse: bool, trained: bool) -> None:
    """Plans the packed calls of problems, forward and, where ``trained``, backward, and loads their kernels on a GPU.

    Raises NotImplementedError, CompileError or CudaError as the calls themselves would.
    """
    from natcore.backends.cuda import load_plan

    calls = [packed_call("forward", problem, with_lse) for problem in problems]
    if trained:
        calls += [packed_call("backward", call.problem, True) for call in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        for _ in pool.map(lambda call: load_plan(call, device_index, None), calls):
            pass
