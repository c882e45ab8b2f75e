"""The places of a window (see natcore.unfused) and the keys of a tile's box: one to the other, and dropout.

place rows [16, places]      one query per row, as in memory
weights    [keys, 16]        one query per lane, as in the products; 0 outside its window
"""

# ruff: noqa: I001  (the lists of table entries stay dense)
from __future__ import annotations

import numpy as np
from numba import njit

from natcore.backends.cpu.geometry import COUNT, END, LANES, POSITION, START
from natcore.backends.cpu.memory import box_keys, is_query, of_axis
from natcore.backends.cpu.products import BLOCK
from natcore.backends.cpu.simd import address_of, load, outlined, pointer_to, store
from natcore.backends.cpu.tables import (
    ADDRESS, DROPOUT_FACTOR, DROPOUT_SEED, DROPOUT_THRESHOLD, EXTENT_T, EXTENT_X, EXTENT_Y, HEADS, KERNEL_X, KERNEL_Y,
    LANE_HEAD, PLACE_BATCH, PLACE_HEAD, PLACE_T, PLACE_X, PLACE_Y, PLACES, EXTRA,
)  # fmt: skip
from natcore.backends.cpu.tile import fill

#: What `visit` does.
GATHER, SCATTER, FACTORS = np.int64(0), np.int64(1), np.int64(2)
_WORD, _MULTIPLIER, _WEYL = np.int64(0xFFFFFFFF), np.int64(0xD256D193), np.int64(0x9E3779B9)


@njit(error_model="numpy")
def philox(counter, key):
    """The first word of Philox-2x32-10 (see natcore.reference_dropout); all words are kept in int64."""
    low, high = counter & _WORD, (counter >> 32) & _WORD
    for _ in range(10):
        product = low * _MULTIPLIER  # of which the upper bits may look like a sign
        low, high = ((product >> 32) & _WORD) ^ key ^ high, product & _WORD
        key = (key + _WEYL) & _WORD
    return low


@njit(error_model="numpy")
def query_number(w, lane):
    """The number of a lane's query in [batch, *spatial, heads]."""
    token = w.integers[PLACE_BATCH] * w.sizes[EXTENT_T] + of_axis(w, PLACE_T, POSITION + lane)
    token = token * w.sizes[EXTENT_Y] + of_axis(w, PLACE_Y, POSITION + lane)
    token = token * w.sizes[EXTENT_X] + of_axis(w, PLACE_X, POSITION + lane)
    return token * w.sizes[HEADS] + w.integers[PLACE_HEAD] + w.sizes[LANE_HEAD + lane]


@njit(error_model="numpy")
def visit_run(what, weights, rows, place, count, seed, threshold, factor):
    """``count`` keys of one lane that lie side by side, and so do their places."""
    outlined()
    if what == GATHER:
        for i in range(count):
            weights[i * LANES] = rows[place + i]
    elif what == SCATTER:
        for i in range(count):
            rows[place + i] = weights[i * LANES]
    else:
        for i in range(count):
            weights[i * LANES] = factor if philox(place + i, seed) >= threshold else 0.0


@njit(error_model="numpy")
def visit(w, what, weights, rows, pitch, first, last):
    """All pairs of a lane and a key in [first, last) that its query sees.

    GATHER: weights = rows; SCATTER: rows = weights; FACTORS: weights = what dropout multiplies with.
    """
    keys_y, keys_x, box = of_axis(w, PLACE_Y, COUNT), of_axis(w, PLACE_X, COUNT), box_keys(w)
    seed, threshold, factor = np.int64(0), w.sizes[DROPOUT_THRESHOLD], 0.0
    if what == FACTORS:
        seed = np.int64(pointer_to(w.operands[DROPOUT_SEED + ADDRESS], np.uint32(0))[0])
        factor = pointer_to(address_of(w.sizes, DROPOUT_FACTOR), np.float64(0))[0]
    for lane in range(LANES):
        if not is_query(w, lane):
            continue
        base = query_number(w, lane) * w.sizes[PLACES] if what == FACTORS else lane * pitch
        start_y, start_x = of_axis(w, PLACE_Y, START + lane), of_axis(w, PLACE_X, START + lane)
        plane = base
        for t in range(of_axis(w, PLACE_T, START + lane), of_axis(w, PLACE_T, END + lane)):
            place = plane
            for y in range(start_y, of_axis(w, PLACE_Y, END + lane)):
                line = (t * keys_y + y) * keys_x
                low = max(line + start_x, first)
                count = min(line + of_axis(w, PLACE_X, END + lane), last) - low
                at = pointer_to(address_of(weights, (low - first) * LANES + lane), weights[0])
                visit_run(what, at, rows, place + low - line - start_x, count, seed, threshold, factor)
                place += w.sizes[KERNEL_X]
            plane += w.sizes[KERNEL_Y] * w.sizes[KERNEL_X]
        low = max(box, first)
        at = pointer_to(address_of(weights, (low - first) * LANES + lane), weights[0])
        place = base + w.sizes[PLACES] - w.sizes[EXTRA] + low - box
        visit_run(what, at, rows, place, last - low, seed, threshold, factor)


@njit(error_model="numpy")
def gather_places(w, weights, rows, pitch, first, last):
    """weights of keys [first, last), rounded up to BLOCK, from place rows."""
    outlined()
    fill(weights, -(-(last - first) // BLOCK) * BLOCK * LANES, 0.0)
    visit(w, GATHER, weights, rows, pitch, first, last)


@njit(error_model="numpy")
def scatter_places(w, rows, weights, pitch, first, last):
    """The way back."""
    outlined()
    visit(w, SCATTER, weights, rows, pitch, first, last)


@njit(error_model="numpy")
def dropout_factors(w, to, first, last):
    """What dropout multiplies the weights of keys [first, last) with, rounded up to BLOCK; 0 outside the windows."""
    outlined()
    fill(to, -(-(last - first) // BLOCK) * BLOCK * LANES, 0.0)
    visit(w, FACTORS, to, to, np.int64(0), first, last)


@njit(error_model="numpy")
def multiply_all(to, factors, count):
    outlined()
    for i in range(0, count, LANES):
        store(to, i, load(to, i) * load(factors, i))
