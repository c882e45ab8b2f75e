"""Arithmetic on [n, 16] matrices in scratch, one query per lane; and finding the tile at hand."""

# ruff: noqa: I001  (the lists of table entries stay dense)
from __future__ import annotations

import numpy as np
from numba import njit

from natcore.backends.cpu.geometry import AXIS_COLUMNS, LANES
from natcore.backends.cpu.products import BLOCK, add_weighted, multiply_keys
from natcore.backends.cpu.simd import load, outlined, pointer_to, shifted, splat, store
from natcore.backends.cpu.tables import (
    AT_AXIS_TILES, AT_INTEGERS, AT_LAYOUT, AT_OPERANDS, AT_SCRATCH, AT_SIZES, AT_TILES, GROUP, PLACE_BATCH,
    PLACE_CLASS, PLACE_HEAD, PLACE_HEADS, PLACE_KV, PLACE_SLAB, PLACE_T, SLAB, Work,
)  # fmt: skip


@njit(error_model="numpy")
def work_of(task, scale):
    """The task's tables as pointers; scratch is of the type of ``scale``."""
    one = task[AT_OPERANDS]  # any int64
    return Work(
        pointer_to(task[AT_OPERANDS], one),
        pointer_to(task[AT_AXIS_TILES], one),
        pointer_to(task[AT_SIZES], one),
        pointer_to(task[AT_INTEGERS], one),
        pointer_to(task[AT_SCRATCH], scale),
        pointer_to(task[AT_LAYOUT], one),
    )


@njit(error_model="numpy")
def set_place(w, task, i, batch, kv, head):
    """Makes tile ``i`` of the task the tile at hand."""
    tile = shifted(pointer_to(task[AT_TILES], np.int32(0)), 4 * i)
    w.integers[PLACE_BATCH] = batch
    w.integers[PLACE_KV] = kv
    w.integers[PLACE_HEAD] = kv * w.sizes[GROUP] + head
    w.integers[PLACE_HEADS] = w.sizes[GROUP] - head
    for axis in range(3):
        w.integers[PLACE_T + axis] = np.int64(tile[axis]) * AXIS_COLUMNS
    w.integers[PLACE_CLASS] = tile[3]
    w.integers[PLACE_SLAB] = task[SLAB]


@njit(error_model="numpy")
def scores_of(scores, start, stride, lanes, keys, number, count):
    """scores [number, 16] = start + keys @ lanes [count, 16]; ``number`` is rounded up to BLOCK."""
    outlined()
    for i in range(0, number, BLOCK):
        from_row, to = shifted(start, i * stride), shifted(scores, i * LANES)
        multiply_keys(to, from_row, stride, lanes, shifted(keys, i), count)


@njit(error_model="numpy")
def add_values(out, weights, values, number, count):
    """out [count, 16] += values.T @ weights [number, 16]; ``count`` is rounded up to BLOCK."""
    outlined()
    for i in range(0, count, BLOCK):
        add_weighted(shifted(out, i * LANES), weights, values, i, number)


@njit(error_model="numpy")
def scale_all(values, count, factor):
    for i in range(0, count, LANES):
        store(values, i, load(values, i) * splat(values, factor))


@njit(error_model="numpy")
def fill(values, count, value):
    for i in range(0, count, LANES):
        store(values, i, splat(values, value))
