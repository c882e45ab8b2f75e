"""The backward call: sums that threads share, in memory of their own where the results cannot hold them.

dk and dv are summed in the results themselves if these have the dtype of the arithmetic. 16-bit
results are rounded from float32 sums: of the batch entry and kv head that a thread is at, or, where
several threads work on one, of a wave of them. The gradients of the bias and of additional keys are
summed per task and per slab, and then over these in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

import numpy as np

from natcore.backends.cpu import compiled
from natcore.backends.cpu.convert import KINDS
from natcore.backends.cpu.executable import Executable, Worker
from natcore.backends.cpu.geometry import LANES
from natcore.backends.cpu.tables import ROWS, TABLE_AFTER, TABLE_BEFORE
from natcore.backends.cpu.threads import worker_count
from natcore.problem import Call

_PLANES = {"dk": "sum_k", "dv": "sum_v"}
_EXTRA = {"d_additional_keys": "sum_additional_keys", "d_additional_values": "sum_additional_values"}
#: Tasks that a phase should have for each thread.
_TASKS_PER_THREAD = 4


class BackwardExecutable(Executable):
    """One prepared backward call."""

    def __init__(self, call: Call):
        super().__init__(call)
        problem = call.problem
        self.results = [n for n, strides in zip(call.operands, call.strides, strict=True) if strides is not None]
        self.own_sums = [name for name in _PLANES if name in self.results and problem.dtype != self.dtype.name]
        self.store = compiled.kernel("store_all", self.dtype.name)
        self.spatial = (1,) * (3 - len(problem.spatial)) + problem.spatial
        self.table_shape = (1,) * (3 - problem.window.rank) + problem.window.rpb_shape

    def __call__(self, pointers: Sequence[int], scale: float, stream: int = 0, workspace: int = 0) -> None:
        problem, operands, slabs = (self.problem, self.operands_at(pointers), len(self.sharing.slabs))
        for name, sums in _PLANES.items():
            operands[ROWS.index(sums)] = operands[ROWS.index(name)]
        extra = {}
        for name in _EXTRA.keys() & self.results:
            number, _, width = problem.shapes[name][1:]
            sums = np.zeros((problem.heads_kv, problem.batch, slabs, number, width), self.dtype)
            heads, batch, slab, x, _ = sums.strides
            operands[ROWS.index(_EXTRA[name])] = self._row(sums.ctypes.data, batch, (slab, 0, x), heads)
            extra[name] = sums
        bias = None
        if "drpb" in self.results:
            bias = np.zeros((problem.heads_kv, problem.heads // problem.heads_kv * prod(self.table_shape)))
        if slabs == 1:
            self._by_plane(operands, scale, bias)
        else:
            self._by_slab(operands, scale, bias)
        for name, sums in extra.items():
            total = np.ascontiguousarray(sums.sum(axis=2))  # over slabs
            self._store(operands, name, total, (*total.shape[:2], 1, 1, *total.shape[2:]))
        if bias is not None:
            self._store(operands, "drpb", bias.astype(self.dtype), (problem.heads, 1, *self.table_shape, 1))

    def _by_plane(self, operands: np.ndarray, scale: float, bias: np.ndarray | None) -> None:
        """Tasks of whole (batch entry, kv head) pairs; each thread has one such pair in its own sums."""

        def worker() -> Worker:
            own = operands.copy()
            sums = [self._own_sums(own, name, 1, (0, 0)) for name in self.own_sums]
            return Worker(self, own, scale, sums)

        tasks = self.sharing.tasks
        partial = self._bias_sums(len(tasks), bias)
        self.run(tasks, worker, partial)
        _add_in_order(bias, partial, [task.kv for task in tasks])

    def _by_slab(self, operands: np.ndarray, scale: float, bias: np.ndarray | None) -> None:
        """Tasks of slabs, in phases, for as many pairs at a time as keep all threads busy."""
        batch, number = self.problem.batch, len(self.sharing.slabs)
        wave = ceil(_TASKS_PER_THREAD * worker_count() / (number // 2))
        planes = batch * self.problem.heads_kv
        for first in range(0, planes, wave):
            some = range(first, min(first + wave, planes))
            own = operands.copy()
            sums = [self._own_sums(own, name, len(some), (first, batch)) for name in self.own_sums]
            for tasks in self.sharing.phases(some):
                partial = self._bias_sums(len(tasks), bias)
                self.run(tasks, lambda own=own, sums=sums: Worker(self, own, scale, sums), partial)
                _add_in_order(bias, partial, [task.kv for task in tasks])

    def _own_sums(self, operands: np.ndarray, name: str, planes: int, place: tuple[int, int]) -> np.ndarray:
        """Memory for the sums of dk or dv of some (kv head, batch entry) pairs, put into the table.

        ``place``: the number of the first pair, and the number of batch entries; (0, 0) for one pair after the other.
        """
        first, batch = place
        sums = np.empty((planes, *self.spatial, self.problem.shapes[name][-1]), self.dtype)
        plane, t, y, x, _ = sums.strides
        stride = plane if batch else 0
        row = self._row(sums.ctypes.data - first * stride, stride, (t, y, x), batch * stride)
        operands[ROWS.index(_PLANES[name])] = row
        return sums

    def _row(self, address: int, batch: int, axes: tuple[int, ...], head: int) -> tuple[int, ...]:
        return address, KINDS.index(self.dtype.name), batch, *axes, head

    def _bias_sums(self, tasks: int, bias: np.ndarray | None) -> np.ndarray | None:
        return None if bias is None else np.zeros((tasks, TABLE_BEFORE + bias.shape[1] + TABLE_AFTER), self.dtype)

    def _store(self, operands: np.ndarray, name: str, numbers: np.ndarray, shape: tuple[int, ...]) -> None:
        """Rounds contiguous numbers [heads, batch, t, y, x, count] to a result."""
        table = np.array([*operands[ROWS.index(name)], numbers.ctypes.data, *shape, *(0,) * LANES], np.int64)
        self.store(table.ctypes.data, self.dtype.type(0))


def _add_in_order(total: np.ndarray | None, partial: np.ndarray | None, rows: list[int]) -> None:
    if total is not None and partial is not None:
        for row, summand in zip(rows, partial, strict=True):
            total[row] += summand[TABLE_BEFORE:-TABLE_AFTER]
