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
from natcore.backends.cpu.products import BLOCK
from natcore.backends.cpu.simd import inside, load, outlined, shifted, splat, store
from natcore.backends.cpu.tables import (
    ADDRESS, BIAS, BOUNDS, CHUNK, CHUNKS, CLASSES, D_BIAS, ENTRIES, GROUP, HEAD, HEADS_PER_TILE, KIND,
    LANE_ADDRESS, LANE_HEAD, OWNER, PLACE_CLASS, PLACE_HEAD, PLACE_HEADS, PLACE_T, PLACE_X, PLACE_Y, RECORD,
    RECORD_COUNT, RECORD_FIRST, RECORD_KEYS_X, RECORD_KEYS_Y, RPB, SLOTS, TABLE, TABLE_T, TABLE_X, TABLE_Y, T, Y,
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
    for head in range(min(w.sizes[HEADS_PER_TILE], w.integers[PLACE_HEADS])):
        for t in range(w.sizes[TABLE_T]):
            address = w.operands[RPB + ADDRESS] + (w.integers[PLACE_HEAD] + head) * w.operands[RPB + HEAD]
            address += t * w.operands[RPB + T]
            for _ in range(w.sizes[TABLE_Y]):
                w.integers[LANE_ADDRESS] = address
                load_rows(shifted(array(w, TABLE), row * table_x), table_x, kind, line, 1, table_x)
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
def make_block(w, block, first, last):
    """block = MASKED, or else the bias (0 without a table), for keys [first, last) of a tile."""
    bounds, table, entries = (array(w, BOUNDS), array(w, TABLE), shifted(w.integers, ENTRIES))
    for lane in range(LANES):  # [start, end) per axis, as vectors
        for axis in range(3):
            bounds[2 * axis * LANES + lane] = of_axis(w, PLACE_T + axis, START + lane)
            bounds[(2 * axis + 1) * LANES + lane] = of_axis(w, PLACE_T + axis, END + lane)
    keys_y, keys_x, box = (of_axis(w, PLACE_Y, COUNT), of_axis(w, PLACE_X, COUNT), box_keys(w))
    zero, masked = splat(block, 0.0), splat(block, MASKED)
    for key in range(first, last):
        here = shifted(block, (key - first) * LANES)
        if key >= box:
            store(here, 0, zero)
            continue
        line = key // keys_x
        t = line // keys_y
        x, y = key - line * keys_x, line - t * keys_y
        allowed = inside(splat(block, t), load(bounds, 0), load(bounds, LANES), zero, masked)
        allowed = inside(splat(block, y), load(bounds, 2 * LANES), load(bounds, 3 * LANES), allowed, masked)
        store(here, 0, inside(splat(block, x), load(bounds, 4 * LANES), load(bounds, 5 * LANES), allowed, masked))
        if w.operands[RPB + ADDRESS]:
            shift = (t * w.sizes[TABLE_Y] + y) * w.sizes[TABLE_X] + x
            for lane in range(LANES):
                if here[lane] == 0:
                    here[lane] = table[entries[lane] + shift]
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
    """Adds a slot's gradient to the entries of the table that its bias was read from."""
    if w.integers[OWNER + slot] < 0:
        return
    record = shifted(w.integers, OWNER + w.sizes[SLOTS] + 1 + slot * RECORD)
    at = slot * w.sizes[CHUNK] * LANES
    bias, gradient = shifted(array(w, BIAS), at), shifted(array(w, D_BIAS), at)
    for i in range(record[RECORD_COUNT]):
        line = (record[RECORD_FIRST] + i) // record[RECORD_KEYS_X]
        x, t = (record[RECORD_FIRST] + i - line * record[RECORD_KEYS_X], line // record[RECORD_KEYS_Y])
        shift = (t * w.sizes[TABLE_Y] + line - t * record[RECORD_KEYS_Y]) * w.sizes[TABLE_X] + x
        for lane in range(LANES):
            if bias[i * LANES + lane] > MASKED / 2:
                sums[record[lane] + shift] += gradient[i * LANES + lane]


@njit(error_model="numpy")
def hand_in_all(w, sums):
    outlined()
    for slot in range(w.sizes[SLOTS]):
        hand_in(w, sums, slot)
        w.integers[OWNER + slot] = -1
