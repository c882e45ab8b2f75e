"""Mask and bias of a tile, [keys, 16]: where its scores start from.

Tiles of the same class have equal blocks, so blocks are remembered in a few slots; OWNER says whose
block is in a slot, and, after the last slot, which head's tables are loaded. The gradient of a
block is summed in the same slot, and handed in to the gradient of the table when the slot changes
hands.
"""

# ruff: noqa: I001  (the lists of table entries stay dense)
from __future__ import annotations

from numba import njit

from natcore.backends.cpu.geometry import COUNT, END, ENTRY, LANES, START
from natcore.backends.cpu.memory import array, box_keys, load_rows, of_axis
from natcore.backends.cpu.products import BLOCK, transpose
from natcore.backends.cpu.simd import inside, load, outlined, shifted, splat, store
from natcore.backends.cpu.tables import (
    ADDRESS, BIAS, BOUNDS, CHUNK, CHUNKS, CLASSES, D_BIAS, ENTRIES, GROUP, HEAD, HEADS_PER_TILE, KIND,
    LANE_ADDRESS, LANE_HEAD, OWNER, PLACE_CLASS, PLACE_HEAD, PLACE_HEADS, PLACE_T, PLACE_X, PLACE_Y, RECORD,
    RECORD_COUNT, RECORD_FIRST, RECORD_KEYS_X, RECORD_KEYS_Y, RPB, SLOTS, SQUARES, TABLE,
    TABLE_AFTER, TABLE_BEFORE, TABLE_T, TABLE_X, TABLE_Y, T, Y,
)  # fmt: skip

#: The score of a key outside the window: e ** MASKED is 0, yet it can be added and subtracted.
MASKED = -1e30


@njit(error_model="numpy")
def forget_blocks(w):
    for slot in range(w.sizes[SLOTS] + 1):
        w.integers[OWNER + slot] = -1


@njit(error_model="numpy")
def load_table(w):
    """The bias tables of a tile's heads, [head, t, y, x]."""
    row = 0
    kind, line, table_x = w.operands[RPB + KIND], shifted(w.integers, LANE_ADDRESS), w.sizes[TABLE_X]
    table = array(w, TABLE)
    for i in range(
        w.sizes[HEADS_PER_TILE] * w.sizes[TABLE_T] * w.sizes[TABLE_Y] * table_x + TABLE_BEFORE + TABLE_AFTER
    ):
        table[i] = 0
    table = shifted(table, TABLE_BEFORE)
    for head in range(min(w.sizes[HEADS_PER_TILE], w.integers[PLACE_HEADS])):
        for t in range(w.sizes[TABLE_T]):
            address = w.operands[RPB + ADDRESS] + (w.integers[PLACE_HEAD] + head) * w.operands[RPB + HEAD]
            address += t * w.operands[RPB + T]
            for _ in range(w.sizes[TABLE_Y]):
                w.integers[LANE_ADDRESS] = address
                load_rows(shifted(table, row * table_x), table_x, kind, line, 1, table_x)
                address += w.operands[RPB + Y]
                row += 1


@njit(error_model="numpy")
def table_entries(w):
    """Per lane, the entry in the loaded tables of the first key of the box."""
    for lane in range(LANES):
        head = min(w.sizes[LANE_HEAD + lane], w.integers[PLACE_HEADS] - 1)
        line = head * w.sizes[TABLE_T] + of_axis(w, PLACE_T, ENTRY + lane)
        line = line * w.sizes[TABLE_Y] + of_axis(w, PLACE_Y, ENTRY + lane)
        w.integers[ENTRIES + lane] = line * w.sizes[TABLE_X] + of_axis(w, PLACE_X, ENTRY + lane)


@njit(error_model="numpy")
def line_shift(w, line, keys_y, x):
    """From the entry of the box's first key to that of key x on a line."""
    t = line // keys_y
    return (t * w.sizes[TABLE_Y] + line - t * keys_y) * w.sizes[TABLE_X] + x


@njit(error_model="numpy")
def entry_of_line(entries, lane, shift, size):
    """The entry at which a lane's line of keys starts; lines that the lane does not see may start anywhere near."""
    return min(max(entries[lane] + shift, -LANES), size)


@njit(error_model="numpy")
def load_line(w, shift):
    """Up to 16 keys of a line: the lanes' entries of the loaded tables, as [key, lane] in the second of SQUARES."""
    square, table, entries = array(w, SQUARES), shifted(array(w, TABLE), TABLE_BEFORE), shifted(w.integers, ENTRIES)
    size = w.sizes[HEADS_PER_TILE] * w.sizes[TABLE_T] * w.sizes[TABLE_Y] * w.sizes[TABLE_X]
    for lane in range(LANES):
        store(square, lane * LANES, load(table, entry_of_line(entries, lane, shift, size)))
    transpose(shifted(square, LANES * LANES), LANES, square, LANES)


@njit(error_model="numpy")
def make_block(w, block, first, last):
    """block = MASKED, or else the bias (0 without a table), for keys [first, last) of a tile, line by line."""
    bounds, square = array(w, BOUNDS), shifted(array(w, SQUARES), LANES * LANES)
    for lane in range(LANES):  # [start, end) per axis, as vectors
        for axis in range(3):
            bounds[2 * axis * LANES + lane] = of_axis(w, PLACE_T + axis, START + lane)
            bounds[(2 * axis + 1) * LANES + lane] = of_axis(w, PLACE_T + axis, END + lane)
    keys_y, keys_x, key, end = of_axis(w, PLACE_Y, COUNT), of_axis(w, PLACE_X, COUNT), first, min(last, box_keys(w))
    masked, nowhere = splat(block, MASKED), splat(block, -1.0)
    for i in range(LANES):
        store(square, i * LANES, splat(block, 0.0))
    while key < end:
        line = key // keys_x
        x, t = key - line * keys_x, line // keys_y
        run = min(min(keys_x - x, end - key), LANES)
        if w.operands[RPB + ADDRESS]:
            load_line(w, line_shift(w, line, keys_y, x))
        # where a lane does not see the line, it sees no key up to its end
        seen = inside(splat(block, t), load(bounds, 0), load(bounds, LANES), load(bounds, 5 * LANES), nowhere)
        y = splat(block, line - t * keys_y)
        seen = inside(y, load(bounds, 2 * LANES), load(bounds, 3 * LANES), seen, nowhere)
        for i in range(run):
            value = inside(splat(block, x + i), load(bounds, 4 * LANES), seen, load(square, i * LANES), masked)
            store(block, (key - first + i) * LANES, value)
        key += run
    for i in range(key - first, last - first):  # additional keys
        store(block, i * LANES, splat(block, 0.0))
    for i in range(last - first, -(-(last - first) // BLOCK) * BLOCK):
        store(block, i * LANES, masked)


@njit(error_model="numpy")
def slot_number(w, first):
    """The number of the block of keys from ``first`` on, among those of one kv head; its slot is this modulo SLOTS."""
    number = (w.integers[PLACE_HEAD] % w.sizes[GROUP]) * w.sizes[CLASSES] + w.integers[PLACE_CLASS]
    return number * w.sizes[CHUNKS] + first // w.sizes[CHUNK]


@njit(error_model="numpy")
def bias_block(w, first, last):
    """The block of keys [first, last); made if it is not remembered."""
    outlined()
    owner, number = shifted(w.integers, OWNER), slot_number(w, first)
    slot = number % w.sizes[SLOTS]
    block = shifted(array(w, BIAS), slot * w.sizes[CHUNK] * LANES)
    if owner[slot] != number:
        owner[slot] = number
        if w.operands[RPB + ADDRESS]:
            if owner[w.sizes[SLOTS]] != w.integers[PLACE_HEAD]:
                owner[w.sizes[SLOTS]] = w.integers[PLACE_HEAD]
                load_table(w)
            table_entries(w)
        make_block(w, block, first, last)
    return block


@njit(error_model="numpy")
def gradient_block(w, sums, first, last):
    """Where the gradient of `bias_block` is summed, before it goes to ``sums`` [group, t, y, x].

    To be called before `bias_block`, which may give the slot to another block.
    """
    outlined()
    owner, number = shifted(w.integers, OWNER), slot_number(w, first)
    slot = number % w.sizes[SLOTS]
    block = shifted(array(w, D_BIAS), slot * w.sizes[CHUNK] * LANES)
    if owner[slot] != number:
        hand_in(w, sums, slot)
        table_entries(w)
        record = shifted(w.integers, OWNER + w.sizes[SLOTS] + 1 + slot * RECORD)
        table = w.sizes[TABLE_T] * w.sizes[TABLE_Y] * w.sizes[TABLE_X]
        for lane in range(LANES):
            record[lane] = w.integers[ENTRIES + lane] + w.integers[PLACE_HEAD] % w.sizes[GROUP] * table
        record[RECORD_KEYS_Y], record[RECORD_KEYS_X] = (of_axis(w, PLACE_Y, COUNT), of_axis(w, PLACE_X, COUNT))
        record[RECORD_FIRST], record[RECORD_COUNT] = (first, min(last, box_keys(w)) - first)
        for i in range(0, (last - first) * LANES, LANES):
            store(block, i, splat(block, 0.0))
    return block


@njit(error_model="numpy")
def hand_in(w, sums, slot):
    """Adds a slot's gradient to the entries of the table that its bias was read from: `load_line` in reverse."""
    if w.integers[OWNER + slot] < 0:
        return
    record = shifted(w.integers, OWNER + w.sizes[SLOTS] + 1 + slot * RECORD)
    gradient, square = shifted(array(w, D_BIAS), slot * w.sizes[CHUNK] * LANES), array(w, SQUARES)
    size = w.sizes[GROUP] * w.sizes[TABLE_T] * w.sizes[TABLE_Y] * w.sizes[TABLE_X]
    key, keys_x, end = record[RECORD_FIRST], record[RECORD_KEYS_X], record[RECORD_FIRST] + record[RECORD_COUNT]
    while key < end:
        line = key // keys_x
        x = key - line * keys_x
        run = min(min(keys_x - x, end - key), LANES)
        for i in range(LANES):
            row = load(gradient, (key - record[RECORD_FIRST] + i) * LANES) if i < run else splat(gradient, 0.0)
            store(square, i * LANES, row)
        transpose(shifted(square, LANES * LANES), LANES, square, LANES)
        shift = line_shift(w, line, record[RECORD_KEYS_Y], x)
        for lane in range(LANES):
            at = TABLE_BEFORE + entry_of_line(record, lane, shift, size)
            store(sums, at, load(sums, at) + load(square, (LANES + lane) * LANES))
        key += run


@njit(error_model="numpy")
def hand_in_all(w, sums):
    outlined()
    for slot in range(w.sizes[SLOTS]):
        hand_in(w, sums, slot)
        w.integers[OWNER + slot] = -1
