"""Unfused attention on the tiles of the fused kernels: the same products, with place rows in between.

    qk           place rows = bias + keys @ q_lanes                av           out += values.T @ weights
    qk_backward  dq += keys.T @ d_scores                           av_backward  d_weights = values @ d_out_lanes
                 dk += d_scores @ (scale * q_rows)                              dv += weights @ d_out_rows

scores, weights and their gradients are [keys, 16] here and `[16, places]` in memory (see places.py).
"""

# ruff: noqa: I001  (the lists of table entries stay dense)
from __future__ import annotations

from collections.abc import Callable

from numba import njit

from natcore.backends.cpu.backward import add_all, clear, keys_gradient, round_sums
from natcore.backends.cpu.bias import bias_block, forget_blocks, gradient_block, hand_in_all
from natcore.backends.cpu.geometry import LANES
from natcore.backends.cpu.memory import (
    array, box_keys, is_query, lanes_to_rows, load_keys, load_queries, rows_to_lanes, store_queries,
)  # fmt: skip
from natcore.backends.cpu.places import gather_places, scatter_places
from natcore.backends.cpu.simd import outlined, pointer_to, shifted, splat, store
from natcore.backends.cpu.tables import (
    ADDRESS, AT_BIAS_SUMS, CHUNK, CLEAR, D_OUT, D_OUT_LANES, D_OUT_ROWS, D_PLACE_ROWS, D_PLACE_SCORES,
    D_PLACE_WEIGHTS, D_SCORES, DIRECT_K, DIRECT_SUM_K, DIRECT_SUM_V, DIRECT_V, DK, DQ, DRPB, DV, EXTRA, EXTRA_K,
    EXTRA_V, FINISH, FIRST_BATCH, GROUP, HEAD_DIM, HEAD_DIM_V, HEADS_PER_TILE, KEY_LIST, KEY_ROWS, KV, LAST_BATCH, OUT,
    OUT_LANES, PLACE_ROWS, PLACE_SCORES, PLACE_WEIGHTS, PLACES, Q_LANES, Q_ROWS, ROW_BUFFER, SCORES, STATE,
    SUM_EXTRA_K, SUM_EXTRA_V, SUM_K, SUM_V, TILE_COUNT, VALUE_LIST, VALUE_ROWS, K, Q, V,
)  # fmt: skip
from natcore.backends.cpu.tile import add_values, fill, scale_all, scores_of, set_place, work_of

INFINITY = float("inf")


@njit(error_model="numpy")
def pitch_of(width):
    return -(-width // LANES) * LANES


@njit(error_model="numpy", inline="always")
def qk_tile(w, scale):
    d, chunk, pitch, pitch_p = w.sizes[HEAD_DIM], w.sizes[CHUNK], pitch_of(w.sizes[HEAD_DIM]), pitch_of(w.sizes[PLACES])
    rows, q_lanes, key_rows, scores = array(w, ROW_BUFFER), array(w, Q_LANES), array(w, KEY_ROWS), array(w, SCORES)
    load_queries(w, rows, pitch, d, Q)
    rows_to_lanes(q_lanes, rows, pitch)
    scale_all(q_lanes, pitch * LANES, scale)
    fill(array(w, PLACE_ROWS), pitch_p * LANES, -INFINITY)
    total = box_keys(w) + w.sizes[EXTRA]
    for first in range(0, total, chunk):
        last = min(first + chunk, total)
        start = bias_block(w, first, last)
        keys = load_keys(w, KEY_LIST, w.sizes[DIRECT_K], key_rows, pitch, d, K, EXTRA_K, first, last)
        scores_of(scores, start, LANES, q_lanes, keys, last - first, d)
        scatter_places(w, array(w, PLACE_ROWS), scores, pitch_p, first, last)
    store_queries(w, array(w, PLACE_ROWS), pitch_p, w.sizes[PLACES], PLACE_SCORES)


@njit(error_model="numpy", inline="always")
def av_tile(w):
    dv, chunk, pitch_p = w.sizes[HEAD_DIM_V], w.sizes[CHUNK], pitch_of(w.sizes[PLACES])
    rows, out, weights, key_rows = array(w, ROW_BUFFER), array(w, OUT_LANES), array(w, SCORES), array(w, KEY_ROWS)
    pitch = pitch_of(dv)
    load_queries(w, array(w, PLACE_ROWS), pitch_p, w.sizes[PLACES], PLACE_WEIGHTS)
    fill(out, pitch * LANES, 0.0)
    total = box_keys(w) + w.sizes[EXTRA]
    for first in range(0, total, chunk):
        last = min(first + chunk, total)
        gather_places(w, weights, array(w, PLACE_ROWS), pitch_p, first, last)
        values = load_keys(w, VALUE_LIST, w.sizes[DIRECT_V], key_rows, pitch, dv, V, EXTRA_V, first, last)
        add_values(out, weights, values, last - first, dv)
    lanes_to_rows(rows, out, pitch)
    store_queries(w, rows, pitch, dv, OUT)


@njit(error_model="numpy", inline="always")
def qk_backward_tile(w, bias_sums, scale):
    d, chunk, pitch, pitch_p = w.sizes[HEAD_DIM], w.sizes[CHUNK], pitch_of(w.sizes[HEAD_DIM]), pitch_of(w.sizes[PLACES])
    key_rows, d_scores, dq = array(w, KEY_ROWS), array(w, D_SCORES), array(w, OUT_LANES)
    load_queries(w, array(w, Q_ROWS), pitch, d, Q)
    scale_all(array(w, Q_ROWS), pitch * LANES, scale)
    load_queries(w, array(w, PLACE_ROWS), pitch_p, w.sizes[PLACES], D_PLACE_SCORES)
    fill(dq, pitch * LANES, 0.0)
    total = box_keys(w) + w.sizes[EXTRA]
    for first in range(0, total, chunk):
        last = min(first + chunk, total)
        gather_places(w, d_scores, array(w, PLACE_ROWS), pitch_p, first, last)
        if w.operands[DRPB + ADDRESS]:
            add_all(gradient_block(w, bias_sums, first, last), d_scores, (last - first) * LANES)
            bias_block(w, first, last)  # takes the slot
        if w.operands[DQ + ADDRESS]:
            keys = load_keys(w, KEY_LIST, w.sizes[DIRECT_K], key_rows, pitch, d, K, EXTRA_K, first, last)
            add_values(dq, d_scores, keys, last - first, d)
        keys_gradient(w, w.sizes[DIRECT_SUM_K], d_scores, array(w, Q_ROWS), pitch, d, SUM_K, SUM_EXTRA_K, first, last)
    if w.operands[DQ + ADDRESS]:
        scale_all(dq, pitch * LANES, scale)
        lanes_to_rows(array(w, ROW_BUFFER), dq, pitch)
        store_queries(w, array(w, ROW_BUFFER), pitch, d, DQ)


@njit(error_model="numpy")
def load_gradient(w, pitch, dv):
    """d_out as rows and as lanes, 0 where there is no query."""
    outlined()
    rows = array(w, D_OUT_ROWS)
    load_queries(w, rows, pitch, dv, D_OUT)
    for lane in range(LANES):
        if not is_query(w, lane):
            fill(shifted(rows, lane * pitch), pitch, 0.0)
    rows_to_lanes(array(w, D_OUT_LANES), rows, pitch)


@njit(error_model="numpy", inline="always")
def av_backward_tile(w):
    dv, chunk, pitch_p = w.sizes[HEAD_DIM_V], w.sizes[CHUNK], pitch_of(w.sizes[PLACES])
    pitch, weights, d_weights, state = pitch_of(dv), array(w, SCORES), array(w, D_SCORES), array(w, STATE)
    load_gradient(w, pitch, dv)
    store(state, 0, splat(state, 0.0))
    load_queries(w, array(w, PLACE_ROWS), pitch_p, w.sizes[PLACES], PLACE_WEIGHTS)
    fill(array(w, D_PLACE_ROWS), pitch_p * LANES, 0.0)
    total = box_keys(w) + w.sizes[EXTRA]
    for first in range(0, total, chunk):
        last = min(first + chunk, total)
        if w.operands[D_PLACE_WEIGHTS + ADDRESS]:
            value_rows = array(w, VALUE_ROWS)
            values = load_keys(w, VALUE_LIST, w.sizes[DIRECT_V], value_rows, pitch, dv, V, EXTRA_V, first, last)
            scores_of(d_weights, state, 0, array(w, D_OUT_LANES), values, last - first, dv)
            scatter_places(w, array(w, D_PLACE_ROWS), d_weights, pitch_p, first, last)
        gather_places(w, weights, array(w, PLACE_ROWS), pitch_p, first, last)
        d_rows = array(w, D_OUT_ROWS)
        keys_gradient(w, w.sizes[DIRECT_SUM_V], weights, d_rows, pitch, dv, SUM_V, SUM_EXTRA_V, first, last)
    if w.operands[D_PLACE_WEIGHTS + ADDRESS]:
        store_queries(w, array(w, D_PLACE_ROWS), pitch_p, w.sizes[PLACES], D_PLACE_WEIGHTS)


def qk(digest: str) -> Callable[[int, float], None]:
    """The kernel, still to be compiled; for the digest see forward.py."""

    def qk_kernel(task_address, scale):
        digest  # noqa: B018
        task = pointer_to(task_address, task_address)
        w = work_of(task, scale)
        forget_blocks(w)
        for batch in range(task[FIRST_BATCH], task[LAST_BATCH]):
            for head in range(0, w.sizes[GROUP], w.sizes[HEADS_PER_TILE]):
                for i in range(task[TILE_COUNT]):
                    set_place(w, task, i, batch, task[KV], head)
                    qk_tile(w, scale)

    return qk_kernel


def av(digest: str) -> Callable[[int, float], None]:
    """As `qk`."""

    def av_kernel(task_address, scale):
        digest  # noqa: B018
        task = pointer_to(task_address, task_address)
        w = work_of(task, scale)
        for batch in range(task[FIRST_BATCH], task[LAST_BATCH]):
            for head in range(0, w.sizes[GROUP], w.sizes[HEADS_PER_TILE]):
                for i in range(task[TILE_COUNT]):
                    set_place(w, task, i, batch, task[KV], head)
                    av_tile(w)

    return av_kernel


def qk_backward(digest: str) -> Callable[[int, float], None]:
    """As `qk`."""

    def qk_backward_kernel(task_address, scale):
        digest  # noqa: B018
        task = pointer_to(task_address, task_address)
        w, bias_sums = work_of(task, scale), pointer_to(task[AT_BIAS_SUMS], scale)
        kv, d = task[KV], w.sizes[HEAD_DIM]
        forget_blocks(w)
        for batch in range(task[FIRST_BATCH], task[LAST_BATCH]):
            if task[CLEAR]:
                clear(w, d, SUM_K, batch, kv)
            for head in range(0, w.sizes[GROUP], w.sizes[HEADS_PER_TILE]):
                for i in range(task[TILE_COUNT]):
                    set_place(w, task, i, batch, kv, head)
                    qk_backward_tile(w, bias_sums, scale)
            if task[FINISH]:
                round_sums(w, scale, d, SUM_K, DK, batch, kv)
        if w.operands[DRPB + ADDRESS] and task[TILE_COUNT] > 0:
            hand_in_all(w, bias_sums)

    return qk_backward_kernel


def av_backward(digest: str) -> Callable[[int, float], None]:
    """As `qk`."""

    def av_backward_kernel(task_address, scale):
        digest  # noqa: B018
        task = pointer_to(task_address, task_address)
        w = work_of(task, scale)
        kv, dv = task[KV], w.sizes[HEAD_DIM_V]
        for batch in range(task[FIRST_BATCH], task[LAST_BATCH]):
            if task[CLEAR]:
                clear(w, dv, SUM_V, batch, kv)
            for head in range(0, w.sizes[GROUP], w.sizes[HEADS_PER_TILE]):
                for i in range(task[TILE_COUNT]):
                    set_place(w, task, i, batch, kv, head)
                    av_backward_tile(w)
            if task[FINISH]:
                round_sums(w, scale, dv, SUM_V, DV, batch, kv)

    return av_backward_kernel
