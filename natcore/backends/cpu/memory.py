"""Between the caller's memory and scratch: rows in, rows out, rows added.

Scratch has the dtype of the arithmetic; a row in it is padded with zeros to its pitch, a multiple
of 16, so that whole vectors can be used.
"""

# ruff: noqa: I001  (the lists of table entries stay dense)
from __future__ import annotations

from numba import njit

from natcore.backends.cpu.geometry import COUNT, FIRST, LANES, POSITION, VALID
from natcore.backends.cpu.simd import BLOCK, load, outlined, pointer_to, read, shifted, store, transpose, write
from natcore.backends.cpu.tables import (
    ADDRESS, BATCH, COLUMNS, DILATION_T, DILATION_X, DILATION_Y, EXTENT_T, EXTENT_X, EXTENT_Y, HEAD, KIND, LANE_HEAD,
    PLACE_BATCH, PLACE_HEAD, PLACE_HEADS, PLACE_KV, PLACE_SLAB, PLACE_T, PLACE_X, PLACE_Y, RUN, T, X, Y,
)  # fmt: skip


@njit(error_model="numpy")
def array(w, name):
    """One of the scratch arrays (see tables.SCRATCH)."""
    return shifted(w.scratch, w.layout[name])


@njit(error_model="numpy")
def of_axis(w, axis, column):
    """An entry of the tile's row of axis tiles; ``axis`` is PLACE_T, PLACE_Y or PLACE_X."""
    return w.axis_tiles[w.integers[axis] + column]


@njit(error_model="numpy")
def load_rows(to, pitch, kind, address, step, rows, count):
    """``rows`` rows of ``count`` elements, ``step`` bytes apart in memory, ``pitch`` elements apart in scratch."""
    outlined()
    for row in range(rows):
        line = shifted(to, row * pitch)
        i = 0
        while i + LANES <= count:
            read(line, address, i, kind, LANES)
            i += LANES
        while i < count:
            read(line, address, i, kind, 1)
            i += 1
        while i < pitch:
            line[i] = 0
            i += 1
        address += step


@njit(error_model="numpy")
def store_rows(kind, address, step, source, pitch, rows, count):
    """The way back of `load_rows`, rounding to the dtype of the memory."""
    outlined()
    for row in range(rows):
        line = shifted(source, row * pitch)
        i = 0
        while i + LANES <= count:
            write(address, line, i, kind, LANES)
            i += LANES
        while i < count:
            write(address, line, i, kind, 1)
            i += 1
        address += step


@njit(error_model="numpy")
def add_rows(to, step, source, pitch, rows, count):
    """Adds rows to rows ``step`` elements apart."""
    outlined()
    for row in range(rows):
        i = 0
        while i + LANES <= count:
            store(to, row * step + i, load(to, row * step + i) + load(source, row * pitch + i))
            i += LANES
        while i < count:
            to[row * step + i] += source[row * pitch + i]
            i += 1


@njit(error_model="numpy")
def lane_address(w, which, lane):
    """Where a lane's query has its row (or its LSE) in an operand. Lanes with no query share a neighbour's."""
    head = w.integers[PLACE_HEAD] + min(w.sizes[LANE_HEAD + lane], w.integers[PLACE_HEADS] - 1)
    return (
        w.operands[which + ADDRESS]
        + w.integers[PLACE_BATCH] * w.operands[which + BATCH]
        + of_axis(w, PLACE_T, POSITION + lane) * w.operands[which + T]
        + of_axis(w, PLACE_Y, POSITION + lane) * w.operands[which + Y]
        + of_axis(w, PLACE_X, POSITION + lane) * w.operands[which + X]
        + head * w.operands[which + HEAD]
    )


@njit(error_model="numpy")
def is_query(w, lane):
    """Whether a lane has a query of its own."""
    valid = of_axis(w, PLACE_T, VALID + lane) & of_axis(w, PLACE_Y, VALID + lane) & of_axis(w, PLACE_X, VALID + lane)
    return valid != 0 and w.sizes[LANE_HEAD + lane] < w.integers[PLACE_HEADS]


@njit(error_model="numpy")
def load_queries(w, to, pitch, count, which):
    """One row of an operand per lane, to[lane, pitch]."""
    outlined()
    for lane in range(LANES):
        address = lane_address(w, which, lane)
        load_rows(shifted(to, lane * pitch), pitch, w.operands[which + KIND], address, 0, 1, count)


@njit(error_model="numpy")
def store_queries(w, source, pitch, count, which):
    """One row per lane that has a query, from source[lane, pitch]."""
    outlined()
    for lane in range(LANES):
        if is_query(w, lane):
            address = lane_address(w, which, lane)
            store_rows(w.operands[which + KIND], address, 0, shifted(source, lane * pitch), pitch, 1, count)


@njit(error_model="numpy")
def rows_to_lanes(to, source, pitch):
    """to[i, lane] = source[lane, i] for i < pitch."""
    outlined()
    for i in range(0, pitch, LANES):
        transpose(shifted(to, i * LANES), LANES, shifted(source, i), pitch)


@njit(error_model="numpy")
def lanes_to_rows(to, source, pitch):
    """to[lane, i] = source[i, lane] for i < pitch."""
    outlined()
    for i in range(0, pitch, LANES):
        transpose(shifted(to, i), pitch, shifted(source, i * LANES), LANES)


@njit(error_model="numpy")
def box_keys(w):
    """Keys of the tile's box."""
    return of_axis(w, PLACE_T, COUNT) * of_axis(w, PLACE_Y, COUNT) * of_axis(w, PLACE_X, COUNT)


@njit(error_model="numpy")
def next_run(w, key, last, which, which_extra):
    """Finds the keys from ``key`` on that lie on one line of memory, and notes them under RUN.

    A tile's keys are those of its box in row-major order, then the additional ones.
    """
    outlined()
    keys_y, keys_x, box = of_axis(w, PLACE_Y, COUNT), of_axis(w, PLACE_X, COUNT), box_keys(w)
    operand = shifted(w.operands, which if key < box else which_extra)
    base = operand[ADDRESS] + w.integers[PLACE_BATCH] * operand[BATCH] + w.integers[PLACE_KV] * operand[HEAD]
    run = shifted(w.integers, RUN)
    run[3] = operand[KIND]
    if key >= box:
        base += w.integers[PLACE_SLAB] * operand[T]
        run[0], run[1], run[2] = base + (key - box) * operand[X], operand[X], last - key
        return
    line = key // keys_x
    t = line // keys_y
    at_t = of_axis(w, PLACE_T, FIRST) + t * w.sizes[DILATION_T]
    at_y = of_axis(w, PLACE_Y, FIRST) + (line - t * keys_y) * w.sizes[DILATION_Y]
    at_x = of_axis(w, PLACE_X, FIRST) + (key - line * keys_x) * w.sizes[DILATION_X]
    run[0] = base + at_t * operand[T] + at_y * operand[Y] + at_x * operand[X]
    run[1] = w.sizes[DILATION_X] * operand[X]
    run[2] = min(min((line + 1) * keys_x, last), box) - key


@njit(error_model="numpy")
def load_keys(w, to, pitch, count, which, which_extra, first, last):
    """Keys (or values) [first, last) of a tile as rows, and zeros up to a multiple of BLOCK rows."""
    outlined()
    run = shifted(w.integers, RUN)
    key = first
    while key < last:
        next_run(w, key, last, which, which_extra)
        load_rows(shifted(to, (key - first) * pitch), pitch, run[3], run[0], run[1], run[2], count)
        key += run[2]
    for i in range((last - first) * pitch, -(-(last - first) // BLOCK) * BLOCK * pitch):
        to[i] = 0


@njit(error_model="numpy")
def add_keys(w, source, pitch, count, which, which_extra, first, last):
    """Adds rows to the sums of keys (or values) [first, last) of a tile, where there are such sums."""
    outlined()
    run = shifted(w.integers, RUN)
    key, box = first, box_keys(w)
    while key < last:
        next_run(w, key, last, which, which_extra)
        if w.operands[(which if key < box else which_extra) + ADDRESS]:
            to, step = pointer_to(run[0], source[0]), run[1] // (8 >> run[3])  # code 0 is float64, 1 is float32
            add_rows(to, step, shifted(source, (key - first) * pitch), pitch, run[2], count)
        key += run[2]


@njit(error_model="numpy")
def store_plane(w, source, pitch, count, which, batch, head):
    """One batch entry and head of a [t, y, x, count] operand, from rows in the same order (all one row: pitch 0)."""
    outlined()
    operand = shifted(w.operands, which)
    for t in range(w.sizes[EXTENT_T]):
        for y in range(w.sizes[EXTENT_Y]):
            address = operand[ADDRESS] + batch * operand[BATCH] + head * operand[HEAD] + t * operand[T] + y * operand[Y]
            row = (t * w.sizes[EXTENT_Y] + y) * w.sizes[EXTENT_X]
            line = shifted(source, row * pitch)
            store_rows(operand[KIND], address, operand[X], line, pitch, w.sizes[EXTENT_X], count)


@njit(error_model="numpy")
def store_all(table_address, like):
    """A whole operand from contiguous numbers [heads, batch, t, y, x, count] of the type of ``like``.

    The table: the operand's row (see tables.ROWS), the address of the numbers, and their shape.
    """
    operand = pointer_to(table_address, table_address)
    shape = shifted(operand, COLUMNS + 1)
    source = pointer_to(operand[COLUMNS], like)
    for head in range(shape[0]):
        for batch in range(shape[1]):
            for t in range(shape[2]):
                for y in range(shape[3]):
                    address = operand[ADDRESS] + head * operand[HEAD] + batch * operand[BATCH]
                    address += t * operand[T] + y * operand[Y]
                    store_rows(operand[KIND], address, operand[X], source, shape[5], shape[4], shape[5])
                    source = shifted(source, shape[4] * shape[5])
