"""From a call to kernels at work: the tables they read, and memory for what they keep."""

# ruff: noqa: I001  (the lists of table entries stay dense)
from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from natcore.backends.cpu import compiled
from natcore.backends.cpu.convert import ITEM_BYTES, KINDS
from natcore.backends.cpu.geometry import LANES, Geometry, geometry
from natcore.backends.cpu.products import BLOCK
from natcore.backends.cpu.sharing import Task, share
from natcore.backends.cpu.tables import (
    ADDRESS, AT_AXIS_TILES, AT_BIAS_SUMS, AT_INTEGERS, AT_LAYOUT, AT_OPERANDS, AT_SCRATCH, AT_SIZES, AT_TILES, BATCH,
    CHUNK, COLUMNS, KV, LISTS, OWNER, RECORD, ROWS, SCRATCH, SIZES, SLOTS, TABLE_AFTER, TABLE_BEFORE, TASK,
)  # fmt: skip
from natcore.backends.cpu.threads import run_all
from natcore.problem import Call, dropout_threshold

#: Elements of the keys and values of a chunk: what should stay in the first-level cache.
_CHUNK_ELEMENTS = 1 << 14
#: Keys of a chunk of very wide heads: the rescaling between chunks must not cost more than they do.
_LEAST_CHUNK = 64
#: Elements of remembered bias blocks: a part of the second-level cache.
_BIAS_ELEMENTS = 1 << 16
#: Scratch that a thread keeps from call to call.
_KEPT_BYTES = 1 << 23

_of_thread = threading.local()


def padded(n: int, to: int = LANES) -> int:
    return -(-n // to) * to


class Executable:
    """One prepared call (natcore.backends.Executable): the forward, and what the backward shares with it."""

    workspace_bytes = 0

    def __init__(self, call: Call):
        self.problem = problem = call.problem
        self.dtype = np.dtype(np.float64 if problem.dtype == "float64" else np.float32)
        self.operands = _operand_table(call)
        self.rows = [ROWS.index(name) for name in call.operands]
        self.geometry = geometry(problem.window, problem.spatial, problem.heads // problem.heads_kv, problem.extra)
        self.sizes = _sizes(call, self.geometry)
        self.scratch_lengths = _scratch_lengths(self.sizes, call)
        backward = call.direction.endswith("backward")
        self.sharing = share(self.geometry, problem.batch, problem.heads_kv, backward)
        self.kernel = compiled.kernel(call.direction, self.dtype.name)

    def __call__(self, pointers: Sequence[int], scale: float, stream: int = 0, workspace: int = 0) -> None:
        operands = self.operands_at(pointers)
        self.run(self.sharing.tasks, lambda: Worker(self, operands, scale))

    def operands_at(self, pointers: Sequence[int]) -> np.ndarray:
        """The operand table of one execution."""
        operands = self.operands.copy()
        operands[self.rows, ADDRESS] = pointers
        return operands

    def run(self, tasks: Sequence[Task], worker: Callable[[], Worker], bias_sums: np.ndarray | None = None) -> None:
        """Runs tasks in any order. Each has a row of ``bias_sums``, where the bias has a gradient."""

        def work() -> Callable[[int], None]:
            run_task = worker().run
            return lambda i: run_task(tasks[i], 0 if bias_sums is None else bias_sums[i].ctypes.data)

        run_all(work, len(tasks))


class Worker:
    """What one thread needs to run tasks: the tables, and scratch of its own."""

    def __init__(self, executable: Executable, operands: np.ndarray, scale: float, sums: Sequence[np.ndarray] = ()):
        slots, chunk = (int(executable.sizes[entry]) for entry in (SLOTS, CHUNK))
        lists = OWNER + slots + 1 + slots * RECORD
        integers = np.empty(lists + len(LISTS) * chunk, np.int64)
        layout = np.cumsum([0, *executable.scratch_lengths])
        layout[-1:] = lists
        layout = np.append(layout, lists + chunk * np.arange(1, len(LISTS)))
        scratch = _scratch(sum(executable.scratch_lengths) * executable.dtype.itemsize)
        self.table = np.zeros(len(TASK), np.int64)
        self.arrays = {  # kept alive: the table only knows their addresses
            AT_OPERANDS: operands,
            AT_AXIS_TILES: executable.geometry.axis_tiles,
            AT_SIZES: executable.sizes,
            AT_INTEGERS: integers,
            AT_SCRATCH: scratch,
            AT_LAYOUT: layout,
        }
        self.sums = sums  # kept alive, too
        for entry, array in self.arrays.items():
            self.table[entry] = array.ctypes.data
        self.arguments = self.table.ctypes.data, executable.dtype.type(scale)
        self.kernel = executable.kernel

    def run(self, task: Task, bias_sums: int) -> None:
        tiles = task.tiles
        self.table[AT_TILES], self.table[AT_BIAS_SUMS] = tiles.ctypes.data, bias_sums
        numbers = (task.kv, task.first_batch, task.last_batch, len(tiles), task.slab, task.clear, task.finish)
        self.table[KV:] = numbers
        self.kernel(*self.arguments)


def _scratch(size: int) -> np.ndarray:
    """At least ``size`` bytes on a cache line, kept by the thread for its next call unless they are many."""
    kept = getattr(_of_thread, "scratch", None)
    if kept is None or len(kept) < size:
        memory = np.empty(size + 64, np.uint8)
        kept = memory[-memory.ctypes.data % 64 :]
        if size <= _KEPT_BYTES:
            _of_thread.scratch = kept
    return kept


def _operand_table(call: Call) -> np.ndarray:
    """The table of operands (see tables.ROWS), still without addresses."""
    table = np.zeros((len(ROWS), COLUMNS), np.int64)
    for name, strides in zip(call.operands, call.strides, strict=True):
        if strides is None or name == "dropout_seed":  # of which only the address matters
            continue
        dtype = call.problem.dtype_of(name)
        if "additional" in name:  # [batch, extra, heads, d]
            batch, axes, head = strides[0], strides[1:2], strides[2]
        elif "rpb" in name:  # [heads, *table]
            batch, axes, head = 0, strides[1:], strides[0]
        elif "lse" in name:  # [batch, *spatial, heads]
            batch, axes, head = strides[0], strides[1:-1], strides[-1]
        else:  # [batch, *spatial, heads, d]
            batch, axes, head = strides[0], strides[1:-2], strides[-2]
        row = 0, KINDS.index(dtype), batch, *(0,) * (3 - len(axes)), *axes, head
        table[ROWS.index(name)] = row
        table[ROWS.index(name), BATCH:] *= ITEM_BYTES[KINDS.index(dtype)]
    return table


def _sizes(call: Call, tiles: Geometry) -> np.ndarray:
    """The table of sizes (see tables.SIZES)."""
    problem = call.problem
    given = {name for name, strides in zip(call.operands, call.strides, strict=True) if strides is not None}
    group = problem.heads // problem.heads_kv
    exact = problem.dtype in ("float32", "float64")
    direct = [exact and width % BLOCK == 0 for width in (problem.head_dim, problem.head_dim_v)]
    for width, name, extra in (
        (problem.head_dim, "dk", "d_additional_keys"),
        (problem.head_dim_v, "dv", "d_additional_values"),
    ):
        direct.append(width % LANES == 0 and name in given and (extra in given or not problem.extra))
    extents, kernel = ((1,) * (3 - problem.window.rank) + problem.spatial, problem.window.kernel_size)
    table = (1,) * (3 - problem.window.rank) + (problem.window.rpb_shape if problem.rpb_dtype else (1,) * len(kernel))
    keys = tiles.box_keys + problem.extra
    per_key = padded(problem.head_dim) + padded(problem.head_dim_v)
    chunk = min(padded(keys, BLOCK), max(_LEAST_CHUNK, padded(_CHUNK_ELEMENTS // per_key, BLOCK)))
    chunks = -(-keys // chunk)
    blocks = tiles.classes * chunks * -(-group // tiles.heads_per_tile)
    slots = min(blocks, max(1, _BIAS_ELEMENTS // (chunk * LANES)))
    numbers = (
        *(problem.head_dim, problem.head_dim_v, problem.extra, group, tiles.heads_per_tile),
        *tiles.dilation,
        *extents,
        *table,
        *(tiles.classes, chunk, chunks, slots),
        *direct,
        *(problem.heads, *((1, *problem.window.kernel_size)[-2:]), problem.places),
        *(dropout_threshold(problem.dropout_p), np.float64(1 / (1 - problem.dropout_p)).view(np.int64)),
    )
    return np.array([*numbers, *tiles.lane_heads], np.int64)


def _scratch_lengths(sizes: np.ndarray, call: Call) -> list[int]:
    """Elements of each scratch array (see tables.SCRATCH)."""
    names = dict(zip(SIZES, (int(n) for n in sizes), strict=False))
    pitch, pitch_v, chunk = (padded(names["head_dim"]), padded(names["head_dim_v"]), names["chunk"])
    wide, bias = max(pitch, pitch_v), names["slots"] * chunk * LANES
    tables = names["heads_per_tile"] * names["table_t"] * names["table_y"] * names["table_x"]
    lengths = {
        "rows": LANES * wide,
        "q_lanes": LANES * pitch,
        "key_rows": chunk * wide,
        "scores": chunk * LANES,
        "bias": bias,
        "bounds": 6 * LANES,
        "table": padded(int(TABLE_BEFORE + TABLE_AFTER) + tables),
        "squares": 2 * LANES * LANES,
        "out_lanes": LANES * wide,
        "state": 3 * LANES,
    }
    if call.problem.dropout_p > 0:
        lengths["factors"] = chunk * LANES
    if call.direction not in ("forward", "backward"):
        lengths |= {name: LANES * padded(names["places"]) for name in ("place_rows", "d_place_rows")}
    if call.direction.endswith("backward"):
        lengths |= {
            "q_rows": LANES * pitch,
            "value_rows": chunk * pitch_v,
            "d_out_rows": LANES * pitch_v,
            "d_out_lanes": LANES * pitch_v,
            "d_scores": chunk * LANES,
            "sum_rows": chunk * wide,
            "d_bias": bias,
        }
    return [lengths.get(name, 0) for name in SCRATCH]
