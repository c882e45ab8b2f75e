"""The forward kernel: softmax over a tile's keys, chunk by chunk, for sixteen queries at once.

    q_lanes [head_dim, 16]     scale * q, one query per lane
    scores  [keys, 16]         = bias + keys @ q_lanes, then e ** (score - top)
    out     [head_dim_v, 16]  += values.T @ scores

Keys and values stay rows as they are in memory: the products broadcast one element of a row to all
lanes. Where the keys do not fit one chunk, the running maximum, sum and output are rescaled (online
softmax: Milakov and Gimelshein, 2018).
"""

# ruff: noqa: I001  (the lists of table entries stay dense)
from __future__ import annotations

from collections.abc import Callable

from numba import njit

from natcore.backends.cpu.bias import MASKED, bias_block, forget_blocks
from natcore.backends.cpu.geometry import LANES
from natcore.backends.cpu.memory import (
    array, box_keys, lanes_to_rows, load_keys, load_queries, rows_to_lanes, store_queries,
)  # fmt: skip
from natcore.backends.cpu.places import dropout_factors, multiply_all
from natcore.backends.cpu.simd import exp, load, log, maximum, outlined, pointer_to, splat, store
from natcore.backends.cpu.tables import (
    ADDRESS, CHUNK, DIRECT_K, DIRECT_V, DROPOUT_SEED, EXTRA, EXTRA_K, EXTRA_V, FACTORS, FIRST_BATCH, GROUP, HEAD_DIM,
    HEAD_DIM_V, HEADS_PER_TILE, KEY_LIST, KEY_ROWS, KV, LAST_BATCH, LSE, OUT, OUT_LANES, Q_LANES, ROW_BUFFER,
    SCORES, SINGLE, STATE, TILE_COUNT, VALUE_LIST, K, Q, V,
)  # fmt: skip
from natcore.backends.cpu.tile import add_values, fill, scale_all, scores_of, set_place, work_of


@njit(error_model="numpy")
def online_softmax(scores, keys, out, count, state):
    """scores becomes e ** (score - top); state [2, 16] (top, sum) and out [count, 16] move along."""
    outlined()
    top = load(state, 0)
    for i in range(0, keys * LANES, LANES):
        top = maximum(top, load(scores, i))
    rescale = exp(load(state, 0) - top)
    total = load(state, LANES) * rescale
    for i in range(0, keys * LANES, LANES):
        weight = exp(load(scores, i) - top)
        total = total + weight
        store(scores, i, weight)
    store(state, 0, top)
    store(state, LANES, total)
    for i in range(0, count * LANES, LANES):
        store(out, i, load(out, i) * rescale)


@njit(error_model="numpy")
def finish(out, count, state):
    """Divides by the sums; state [0, 16] becomes the logarithm of what they stand for."""
    total = load(state, LANES)
    store(state, 0, load(state, 0) + log(total))
    factor = splat(state, 1.0) / total
    for i in range(0, count * LANES, LANES):
        store(out, i, load(out, i) * factor)


@njit(error_model="numpy", inline="always")
def forward_tile(w, scale):
    d, dv, chunk = w.sizes[HEAD_DIM], w.sizes[HEAD_DIM_V], w.sizes[CHUNK]
    pitch, pitch_v = -(-d // LANES) * LANES, -(-dv // LANES) * LANES
    rows, q_lanes, key_rows = array(w, ROW_BUFFER), array(w, Q_LANES), array(w, KEY_ROWS)
    scores, out, state = array(w, SCORES), array(w, OUT_LANES), array(w, STATE)
    load_queries(w, rows, pitch, d, Q)
    rows_to_lanes(q_lanes, rows, pitch)
    scale_all(q_lanes, pitch * LANES, scale)
    fill(out, pitch_v * LANES, 0.0)
    store(state, 0, splat(state, MASKED))
    store(state, LANES, splat(state, 0.0))
    total = box_keys(w) + w.sizes[EXTRA]
    for first in range(0, total, chunk):
        last = min(first + chunk, total)
        number = last - first
        start = bias_block(w, first, last)
        keys = load_keys(w, KEY_LIST, w.sizes[DIRECT_K], key_rows, pitch, d, K, EXTRA_K, first, last)
        scores_of(scores, start, LANES, q_lanes, keys, number, d)
        online_softmax(scores, number, out, dv, state)
        if w.operands[DROPOUT_SEED + ADDRESS]:
            dropout_factors(w, array(w, FACTORS), first, last)
            multiply_all(scores, array(w, FACTORS), number * LANES)
        values = load_keys(w, VALUE_LIST, w.sizes[DIRECT_V], key_rows, pitch_v, dv, V, EXTRA_V, first, last)
        add_values(out, scores, values, number, dv)
    finish(out, dv, state)
    if w.operands[OUT + ADDRESS]:
        lanes_to_rows(rows, out, pitch_v)
        store_queries(w, rows, pitch_v, dv, OUT)
    if w.operands[LSE + ADDRESS]:
        store_queries(w, state, SINGLE, SINGLE, LSE)


def forward(digest: str) -> Callable[[int, float], None]:
    """The kernel, still to be compiled. That it uses the digest makes this a part of numba's key to its cache."""

    def forward_kernel(task_address, scale):
        """The tiles of a part of the map, for some batch entries and one kv head (see tables.TASK)."""
        _ = digest
        task = pointer_to(task_address, task_address)
        w = work_of(task, scale)
        forget_blocks(w)
        for batch in range(task[FIRST_BATCH], task[LAST_BATCH]):
            for head in range(0, w.sizes[GROUP], w.sizes[HEADS_PER_TILE]):
                for i in range(task[TILE_COUNT]):
                    set_place(w, task, i, batch, task[KV], head)
                    forward_tile(w, scale)

    return forward_kernel
