"""Between the caller's memory and scratch: addresses of rows, rows in, rows out, rows added.

Scratch has the dtype of the arithmetic; a row in it is padded with zeros to its pitch, a multiple
of 16, so that whole vectors can be used.
"""

# ruff: noqa: I001  (the lists of table entries stay dense)
from __future__ import annotations

from collections.abc import Callable

from numba import njit

from natcore.backends.cpu.convert import read, write
from natcore.backends.cpu.geometry import COUNT, FIRST, LANES, POSITION, VALID
from natcore.backends.cpu.products import BLOCK, transpose
from natcore.backends.cpu.simd import address_of, load, outlined, pointer_to, shifted, store
from natcore.backends.cpu.tables import (
    ADDRESS, BATCH, COLUMNS, DILATION_T, DILATION_X, DILATION_Y, EXTENT_T, EXTENT_X, EXTENT_Y, HEAD, KIND,
    LANE_ADDRESS, LANE_HEAD, PLACE_BATCH, PLACE_HEAD, PLACE_HEADS, PLACE_KV, PLACE_SLAB, PLACE_T, PLACE_X, PLACE_Y,
    SUM_LIST, T, X, Y,
)  # fmt: skip


@njit(error_model="numpy")
def array(w, name):
    """One of the scratch arrays (see tables.SCRATCH)."""
    return shifted(w.scratch, w.layout[name])


@njit(error_model="numpy")
def address_list(w, name):
    """One of the lists of addresses (see tables.LISTS)."""
    return shifted(w.integers, w.layout[name])


@njit(error_model="numpy")
def of_axis(w, axis, column):
    """An entry of the tile's row of axis tiles; ``axis`` is PLACE_T, PLACE_Y or PLACE_X."""
    return w.axis_tiles[w.integers[axis] + column]


@njit(error_model="numpy")
def load_rows(to, pitch, kind, addresses, rows, count):
    """``rows`` rows of ``count`` elements from a list of addresses, ``pitch`` elements apart in scratch."""
    outlined()
    for row in range(rows):
        line, address = shifted(to, row * pitch), addresses[row]
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


@njit(error_model="numpy")
def store_rows(kind, addresses, source, pitch, rows, count):
    """The way back of `load_rows`, last row first, rounded to the dtype of the memory."""
    outlined()
    for row in range(rows - 1, -1, -1):
        line, address = shifted(source, row * pitch), addresses[row]
        i = 0
        while i + LANES <= count:
            write(address, line, i, kind, LANES)
            i += LANES
        while i < count:
            write(address, line, i, kind, 1)
            i += 1


@njit(error_model="numpy")
def store_line(kind, address, step, addresses, source, pitch, rows, count):
    """Rows of scratch to rows of memory ``step`` bytes apart; ``addresses`` is room for 16."""
    for first in range(0, rows, LANES):
        some = min(LANES, rows - first)
        for i in range(some):
            addresses[i] = address + (first + i) * step
        store_rows(kind, addresses, shifted(source, first * pitch), pitch, some, count)


@njit(error_model="numpy")
def lane_addresses(w, which):
    """Where each lane's query has its row (or its LSE) in an operand. Lanes with no query share a neighbour's."""
    outlined()
    operand, addresses, heads = (
        shifted(w.operands, which),
        shifted(w.integers, LANE_ADDRESS),
        shifted(w.sizes, LANE_HEAD),
    )
    t = shifted(w.axis_tiles, w.integers[PLACE_T] + POSITION)
    y = shifted(w.axis_tiles, w.integers[PLACE_Y] + POSITION)
    x = shifted(w.axis_tiles, w.integers[PLACE_X] + POSITION)
    base = operand[ADDRESS] + w.integers[PLACE_BATCH] * operand[BATCH] + w.integers[PLACE_HEAD] * operand[HEAD]
    step_t, step_y, step_x, step_head, last = (
        operand[T],
        operand[Y],
        operand[X],
        operand[HEAD],
        w.integers[PLACE_HEADS] - 1,
    )
    for lane in range(LANES):
        place = base + t[lane] * step_t + y[lane] * step_y + x[lane] * step_x
        addresses[lane] = place + min(heads[lane], last) * step_head
    return addresses


@njit(error_model="numpy")
def is_query(w, lane):
    """Whether a lane has a query of its own."""
    valid = of_axis(w, PLACE_T, VALID + lane) & of_axis(w, PLACE_Y, VALID + lane) & of_axis(w, PLACE_X, VALID + lane)
    return valid != 0 and w.sizes[LANE_HEAD + lane] < w.integers[PLACE_HEADS]


@njit(error_model="numpy")
def load_queries(w, to, pitch, count, which):
    """One row of an operand per lane, to[lane, pitch]."""
    load_rows(to, pitch, w.operands[which + KIND], lane_addresses(w, which), LANES, count)


@njit(error_model="numpy")
def store_queries(w, source, pitch, count, which):
    """One row per lane, from source[lane, pitch].

    Lanes without a query share the address of a lane before them, which is written after them.
    """
    addresses = lane_addresses(w, which)
    store_rows(w.operands[which + KIND], addresses, source, pitch, LANES, count)


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
def list_keys(w, to, which, which_extra, first, last):
    """Addresses of keys (or values, or sums) [first, last): the box in row-major order, then the additional ones."""
    outlined()
    operand = shifted(w.operands, which)
    step_t, step_y = w.sizes[DILATION_T] * operand[T], w.sizes[DILATION_Y] * operand[Y]
    step_x = w.sizes[DILATION_X] * operand[X]
    keys_y, keys_x, box = of_axis(w, PLACE_Y, COUNT), of_axis(w, PLACE_X, COUNT), box_keys(w)
    line = operand[ADDRESS] + w.integers[PLACE_BATCH] * operand[BATCH] + w.integers[PLACE_KV] * operand[HEAD]
    line += of_axis(w, PLACE_T, FIRST) * operand[T]
    line += of_axis(w, PLACE_Y, FIRST) * operand[Y] + of_axis(w, PLACE_X, FIRST) * operand[X]
    x, y = first % keys_x, first // keys_x % keys_y
    line += first // (keys_x * keys_y) * step_t + y * step_y
    key = first
    while key < min(last, box):
        run = min(keys_x - x, min(last, box) - key)
        for i in range(run):
            to[key - first + i] = line + (x + i) * step_x
        key, x, y, line = key + run, 0, y + 1, line + step_y
        if y == keys_y:
            y, line = 0, line + step_t - keys_y * step_y
    operand = shifted(w.operands, which_extra)
    base = operand[ADDRESS] + w.integers[PLACE_BATCH] * operand[BATCH] + w.integers[PLACE_KV] * operand[HEAD]
    base += w.integers[PLACE_SLAB] * operand[T]
    while key < last:
        to[key - first] = base + (key - box) * operand[X]
        key += 1


@njit(error_model="numpy")
def load_keys(w, list_name, direct, rows, pitch, count, which, which_extra, first, last):
    """The list of keys (or values) [first, last), rounded up to BLOCK; of copies in scratch unless ``direct``."""
    outlined()
    addresses, keys = address_list(w, list_name), last - first
    list_keys(w, addresses, which, which_extra, first, last)
    if not direct:
        load_rows(rows, pitch, w.operands[which + KIND], addresses, keys, count)
        for i in range(keys):
            addresses[i] = address_of(rows, i * pitch)
    for i in range(keys, -(-keys // BLOCK) * BLOCK):
        addresses[i] = addresses[keys - 1]  # of no weight, but something must be there
    return addresses


@njit(error_model="numpy")
def add_rows(w, source, pitch, count, which, which_extra, first, last):
    """Adds rows of scratch to the sums of keys [first, last), where there are such sums."""
    outlined()
    addresses, box = address_list(w, SUM_LIST), box_keys(w)
    list_keys(w, addresses, which, which_extra, first, last)
    for key in range(first, last):
        if w.operands[(which if key < box else which_extra) + ADDRESS]:
            to, row = pointer_to(addresses[key - first], source[0]), shifted(source, (key - first) * pitch)
            i = 0
            while i + LANES <= count:
                store(to, i, load(to, i) + load(row, i))
                i += LANES
            while i < count:
                to[i] += row[i]
                i += 1


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
            addresses = shifted(w.integers, LANE_ADDRESS)
            store_line(operand[KIND], address, operand[X], addresses, line, pitch, w.sizes[EXTENT_X], count)


def store_all(digest: str) -> Callable[[int, float], None]:
    """A kernel, still to be compiled; for the digest see forward.py."""

    def store_all_kernel(table_address, like):
        """A whole operand from contiguous numbers [heads, batch, t, y, x, count] of the type of ``like``.

        The table: the operand's row (see tables.ROWS), the address of the numbers, their shape, and room for 16 more.
        """
        _ = digest
        operand = pointer_to(table_address, table_address)
        shape = shifted(operand, COLUMNS + 1)
        source = pointer_to(operand[COLUMNS], like)
        for head in range(shape[0]):
            for batch in range(shape[1]):
                for t in range(shape[2]):
                    for y in range(shape[3]):
                        address = operand[ADDRESS] + head * operand[HEAD] + batch * operand[BATCH]
                        address += t * operand[T] + y * operand[Y]
                        store_line(
                            operand[KIND], address, operand[X], shifted(shape, 6), source, shape[5], shape[4], shape[5]
                        )
                        source = shifted(source, shape[4] * shape[5])

    return store_all_kernel
