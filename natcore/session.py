"""One call through the public door: where it runs, its preparation (cached), its launch.

arrays  ->  Session.read: views  ->  _prepare: Problem, Call, Executable (cached)  ->  executable(...)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from natcore import backends
from natcore.arrays import Borrowed, Kind, kind_of, stream_handle
from natcore.planning import Config
from natcore.problem import (
    OPERANDS,
    RESULTS,
    Direction,
    Problem,
    Window,
    call_of,
    check_operand,
    check_result,
    problem_of,
)
from natcore.unfused import unfused_problem_of
from natcore.views import ITEM_SIZES, Device, View, contiguous_strides

_ALIGNMENT = 256


class _Prepared(NamedTuple):
    problem: Problem
    executable: backends.Executable
    fresh: tuple[tuple[int, tuple[int, ...], str], ...]  # results to allocate: place, shape, dtype


@lru_cache(maxsize=4096)
def _prepare(
    direction: Direction,
    window_of: tuple,
    described: tuple[View | None, ...],
    dropout_p: float,
    config: Config | None,
) -> _Prepared:
    """Everything that needs no memory: checks, plan, kernels. ``described`` follows OPERANDS."""
    window = Window.of(*window_of)
    views = dict(zip(OPERANDS[direction], described, strict=True))
    if direction in ("forward", "backward"):
        problem = problem_of(window, views, dropout_p)
    else:
        problem = unfused_problem_of(direction, window, views)
    device = next(view.device for view in described if view is not None)
    for name, view in views.items():
        if view is not None:
            check = check_result if name in RESULTS[direction] else check_operand
            check(problem, name, view, device)
    fresh = tuple(
        (index, problem.shapes[name], problem.dtype_of(name))
        for index, name in enumerate(OPERANDS[direction])
        if name in RESULTS[direction] and views[name] is None and problem.has(name)
    )
    for index, shape, dtype in fresh:
        views[OPERANDS[direction][index]] = View(0, shape, contiguous_strides(shape), dtype, device)
    return _Prepared(problem, backends.prepare(call_of(direction, problem, views), device, config), fresh)


class Session(NamedTuple):
    """Where one call happens: the kind of array that q is, its device, the stream (None on the CPU)."""

    kind: Kind
    like: Any
    device: Device
    stream: int | None

    @classmethod
    def of(cls, name: str, q: Any, stream: Any) -> Session:
        kind = kind_of(name, q)
        device = kind.device(name, q)
        if device.type == "cpu":
            if stream is not None:
                raise ValueError(f"stream {stream!r} was given, but {name} is on the CPU.")
            return cls(kind, q, device, None)
        return cls(kind, q, device, kind.current_stream(device) if stream is None else stream_handle(stream))

    def read(self, name: str, array: Any) -> Borrowed | None:
        return None if array is None else kind_of(name, array).read(name, array, self.stream)

    def seed(self, dropout_p: float, seed: int | None) -> Borrowed | None:
        """The seed in memory, where kernels read it."""
        if not dropout_p:
            return None
        if seed is None or not hasattr(seed, "__index__") or not 0 <= int(seed) < 1 << 32:
            raise ValueError(f"dropout_p {dropout_p} needs a dropout_seed in [0, 2 ** 32), not {seed!r}.")
        view = View(0, (1,), (1,), "uint32", self.device)
        if self.stream is None:
            array = np.array([seed], np.uint32)
            return Borrowed(array.__array_interface__["data"][0], view, True, array)
        from natcore import device as gpu

        array, address = self.empty((1,), "float32")  # of four bytes
        gpu.fill(self.device.index, address, int(seed), self.stream)
        return Borrowed(address, view, True, array)

    def empty(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
        """New memory and its address."""
        array = self.kind.empty(shape, dtype, self.like, self.device, self.stream)
        return array, self.kind.address(array)


def run(
    session: Session,
    direction: Direction,
    window_of: tuple,
    operands: tuple[Borrowed | None, ...],
    scale: float | None,
    config: Config | None,
    dropout_p: float = 0.0,
) -> list[Any]:
    """Prepares and runs one call on operands in OPERANDS order; returns the arrays that were allocated
    for absent results, at their places, None elsewhere."""
    described = tuple([None if b is None else b.described for b in operands])
    problem, executable, fresh = _prepare(direction, window_of, described, dropout_p, config)
    pointers = [0 if b is None else b.ptr for b in operands]
    results: list[Any] = [None] * len(pointers)
    for index, shape, dtype in fresh:
        results[index], pointers[index] = session.empty(shape, dtype)
    workspace = 0
    if executable.workspace_bytes:
        words = -(-(executable.workspace_bytes + _ALIGNMENT) // ITEM_SIZES["float32"])
        _held, address = session.empty((words,), "float32")  # until the launch; then the stream's order protects it
        workspace = -(-address // _ALIGNMENT) * _ALIGNMENT
    if scale is None:
        scale = problem.default_scale if direction in ("forward", "backward") else 1.0
    executable(pointers, float(scale), session.stream or 0, workspace)
    session.kind.finish(session.device, session.stream)
    return results


def window_arguments(rank: int, *arguments: Any) -> tuple:
    """Hashable: sequences become tuples."""
    return (rank, *[tuple(a) if isinstance(a, Sequence) else a for a in arguments])
