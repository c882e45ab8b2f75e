"""The backward kernel: the same tiles and chunks as the forward, and five products instead of two.

    p        [keys, 16]  = e ** (bias + keys @ q_lanes - lse)
    d_scores [keys, 16]  = p * (values @ d_out_lanes - delta + d_lse),  delta = sum over d of out * d_out
                           (dropout multiplies the product, and p below, by its factors)
    dq       [d, 16]    += keys.T @ d_scores
    dk       [keys, d]  += d_scores @ (scale * q_rows)
    dv       [keys, dv] += p @ d_out_rows

(Dao et al., "FlashAttention", 2022, appendix B; d_lse is the gradient of the LSE.) dk and dv of the
keys of a tile are added to sums in memory; who adds when is settled in executable.py, so no two
threads ever add to the same key, and always in the same order.
"""

# ruff: noqa: I001  (the lists of table entries stay dense)
from __future__ import annotations

from collections.abc import Callable

from numba import njit

from natcore.backends.cpu.bias import bias_block, forget_blocks, gradient_block, hand_in_all
from natcore.backends.cpu.geometry import LANES
from natcore.backends.cpu.memory import (
    add_rows, address_list, array, box_keys, is_query, lanes_to_rows, list_keys, load_keys, load_queries,
    rows_to_lanes, store_plane, store_queries,
)  # fmt: skip
from natcore.backends.cpu.places import dropout_factors, multiply_all
from natcore.backends.cpu.products import BLOCK, add_to_keys
from natcore.backends.cpu.simd import address_of, exp, load, outlined, pointer_to, shifted, splat, store
from natcore.backends.cpu.tables import (
    ADDRESS, AT_BIAS_SUMS, BATCH, CHUNK, CLEAR, D_LSE, D_OUT, D_OUT_LANES, D_OUT_ROWS, D_SCORES, DIRECT_K,
    DIRECT_SUM_K, DIRECT_SUM_V, DIRECT_V, DK, DQ, DROPOUT_SEED, DRPB, DV, EXTRA, EXTRA_K, EXTRA_V, FACTORS, FINISH,
    FIRST_BATCH, GROUP, HEAD, HEAD_DIM, HEAD_DIM_V, HEADS_PER_TILE, KEY_LIST, KEY_ROWS, KV, LAST_BATCH, LSE, OUT,
    OUT_LANES, Q_LANES, Q_ROWS, REPEATED, ROW_BUFFER, SCORES, SINGLE, STATE, SUM_EXTRA_K, SUM_EXTRA_V, SUM_K, SUM_LIST,
    SUM_ROWS, SUM_V, TILE_COUNT, VALUE_LIST, VALUE_ROWS, K, Q, V,
)  # fmt: skip
from natcore.backends.cpu.tile import add_values, fill, scale_all, scores_of, set_place, work_of

#: Rows of STATE: the LSE, d_lse - delta, zeros.
FROM_LSE, SHIFT, NOTHING = 0, LANES, 2 * LANES


@njit(error_model="numpy")
def load_tile(w, pitch, pitch_v, scale):
    """Everything about the queries: q and d_out as rows and as lanes, the LSE and d_lse - delta."""
    outlined()
    d, dv, state = w.sizes[HEAD_DIM], w.sizes[HEAD_DIM_V], array(w, STATE)
    rows, d_rows, d_lanes, out = (
        array(w, ROW_BUFFER),
        array(w, D_OUT_ROWS),
        array(w, D_OUT_LANES),
        array(w, OUT_LANES),
    )
    load_queries(w, array(w, Q_ROWS), pitch, d, Q)
    scale_all(array(w, Q_ROWS), pitch * LANES, scale)
    rows_to_lanes(array(w, Q_LANES), array(w, Q_ROWS), pitch)
    load_queries(w, state, SINGLE, SINGLE, LSE)
    store(state, SHIFT, splat(state, 0.0))
    store(state, NOTHING, splat(state, 0.0))
    if w.operands[D_LSE + ADDRESS]:
        load_queries(w, shifted(state, SHIFT), SINGLE, SINGLE, D_LSE)
    load_queries(w, d_rows, pitch_v, dv, D_OUT)
    for lane in range(LANES):  # what comes in is zero where there is no query, and so is all that follows
        if not is_query(w, lane):
            state[SHIFT + lane] = 0
            fill(shifted(d_rows, lane * pitch_v), pitch_v, 0.0)
    rows_to_lanes(d_lanes, d_rows, pitch_v)
    load_queries(w, rows, pitch_v, dv, OUT)
    rows_to_lanes(out, rows, pitch_v)
    shift = load(state, SHIFT)
    for i in range(0, dv * LANES, LANES):
        shift = shift - load(out, i) * load(d_lanes, i)
    store(state, SHIFT, shift)


@njit(error_model="numpy")
def differentiate(p, d_scores, count, state):
    """p from scores, d_scores from values @ d_out_lanes - delta + d_lse."""
    outlined()
    lse = load(state, FROM_LSE)
    for i in range(0, count * LANES, LANES):
        weight = exp(load(p, i) - lse)
        store(p, i, weight)
        store(d_scores, i, weight * load(d_scores, i))


@njit(error_model="numpy")
def add_all(to, source, count):
    outlined()
    for i in range(0, count, LANES):
        store(to, i, load(to, i) + load(source, i))


@njit(error_model="numpy")
def add_row(to, row, rows):
    outlined()
    for i in range(0, rows * LANES, LANES):
        store(to, i, load(to, i) + load(row, 0))


@njit(error_model="numpy")
def add_to_sums(sums, weights, rows, pitch, number):
    """Each listed row of ``sums`` += weights [number, 16] @ rows [16, pitch], ``number`` rounded up to BLOCK."""
    outlined()
    for key in range(0, number, BLOCK):
        for i in range(0, pitch, LANES):
            add_to_keys(shifted(sums, key), i, shifted(weights, key * LANES), shifted(rows, i), pitch)


@njit(error_model="numpy")
def keys_gradient(w, direct, weights, rows, pitch, width, which, which_extra, first, last):
    """Adds weights [keys, 16] @ rows [16, width] to the sums of keys [first, last)."""
    number, sums = last - first, address_list(w, SUM_LIST)
    padded, own_rows = -(-number // BLOCK) * BLOCK, array(w, SUM_ROWS)
    if direct:
        list_keys(w, sums, which, which_extra, first, last)
        for i in range(number, padded):
            sums[i] = address_of(own_rows, 0)  # of no weight
        add_to_sums(sums, weights, rows, pitch, number)
    elif w.operands[which + ADDRESS] or w.operands[which_extra + ADDRESS]:
        fill(own_rows, padded * pitch, 0.0)
        for i in range(padded):
            sums[i] = address_of(own_rows, i * pitch)
        add_to_sums(sums, weights, rows, pitch, number)
        add_rows(w, own_rows, pitch, width, which, which_extra, first, last)


@njit(error_model="numpy", inline="always")
def backward_tile(w, bias_sums, scale):
    d, dv, chunk = w.sizes[HEAD_DIM], w.sizes[HEAD_DIM_V], w.sizes[CHUNK]
    pitch, pitch_v = -(-d // LANES) * LANES, -(-dv // LANES) * LANES
    load_tile(w, pitch, pitch_v, scale)
    p, d_scores, state, dq = array(w, SCORES), array(w, D_SCORES), array(w, STATE), array(w, OUT_LANES)
    key_rows, value_rows, shift = array(w, KEY_ROWS), array(w, VALUE_ROWS), shifted(state, SHIFT)
    fill(dq, pitch * LANES, 0.0)
    total = box_keys(w) + w.sizes[EXTRA]
    for first in range(0, total, chunk):
        last = min(first + chunk, total)
        number = last - first
        d_bias = gradient_block(w, bias_sums, first, last) if w.operands[DRPB + ADDRESS] else p
        start = bias_block(w, first, last)
        keys = load_keys(w, KEY_LIST, w.sizes[DIRECT_K], key_rows, pitch, d, K, EXTRA_K, first, last)
        values = load_keys(w, VALUE_LIST, w.sizes[DIRECT_V], value_rows, pitch_v, dv, V, EXTRA_V, first, last)
        scores_of(p, start, LANES, array(w, Q_LANES), keys, number, d)
        padded = -(-number // BLOCK) * BLOCK
        if w.operands[DROPOUT_SEED + ADDRESS]:
            factors = array(w, FACTORS)
            scores_of(d_scores, shifted(state, NOTHING), 0, array(w, D_OUT_LANES), values, number, dv)
            dropout_factors(w, factors, first, last)
            multiply_all(d_scores, factors, padded * LANES)
            add_row(d_scores, shift, padded)
            differentiate(p, d_scores, padded, state)
            multiply_all(p, factors, padded * LANES)
        else:
            scores_of(d_scores, shift, 0, array(w, D_OUT_LANES), values, number, dv)
            differentiate(p, d_scores, padded, state)
        if w.operands[DRPB + ADDRESS]:
            add_all(d_bias, d_scores, number * LANES)
        add_values(dq, d_scores, keys, number, d)
        keys_gradient(w, w.sizes[DIRECT_SUM_K], d_scores, array(w, Q_ROWS), pitch, d, SUM_K, SUM_EXTRA_K, first, last)
        keys_gradient(w, w.sizes[DIRECT_SUM_V], p, array(w, D_OUT_ROWS), pitch_v, dv, SUM_V, SUM_EXTRA_V, first, last)
    if w.operands[DQ + ADDRESS]:
        scale_all(dq, pitch * LANES, scale)
        lanes_to_rows(array(w, ROW_BUFFER), dq, pitch)
        store_queries(w, array(w, ROW_BUFFER), pitch, d, DQ)


@njit(error_model="numpy")
def clear(w, width, which, batch, kv):
    """Zeros in the sums of one batch entry and kv head."""
    if w.operands[which + ADDRESS]:
        row = array(w, ROW_BUFFER)
        fill(row, -(-width // LANES) * LANES, 0.0)
        store_plane(w, row, REPEATED, width, which, batch, kv)


@njit(error_model="numpy")
def round_sums(w, like, width, sums, which, batch, kv):
    """The result from sums that have a memory of their own, [t, y, x, width]."""
    if w.operands[which + ADDRESS] and w.operands[which + ADDRESS] != w.operands[sums + ADDRESS]:
        operand = shifted(w.operands, sums)
        source = pointer_to(operand[ADDRESS] + batch * operand[BATCH] + kv * operand[HEAD], like)
        store_plane(w, source, width, width, which, batch, kv)


def backward(digest: str) -> Callable[[int, float], None]:
    """The kernel, still to be compiled; for the digest see forward.py."""

    def backward_kernel(task_address, scale):
        """The tiles of a part of the map, for some batch entries and one kv head (see tables.TASK).

        With CLEAR the sums are first set to zero, with FINISH the results are made of them at last.
        """
        _ = digest
        task = pointer_to(task_address, task_address)
        w, bias_sums = work_of(task, scale), pointer_to(task[AT_BIAS_SUMS], scale)
        kv, d, dv = task[KV], w.sizes[HEAD_DIM], w.sizes[HEAD_DIM_V]
        forget_blocks(w)
        for batch in range(task[FIRST_BATCH], task[LAST_BATCH]):
            if task[CLEAR]:
                clear(w, d, SUM_K, batch, kv)
                clear(w, dv, SUM_V, batch, kv)
            for head in range(0, w.sizes[GROUP], w.sizes[HEADS_PER_TILE]):
                for i in range(task[TILE_COUNT]):
                    set_place(w, task, i, batch, kv, head)
                    backward_tile(w, bias_sums, scale)
            if task[FINISH]:
                round_sums(w, scale, d, SUM_K, DK, batch, kv)
                round_sums(w, scale, dv, SUM_V, DV, batch, kv)
        if w.operands[DRPB + ADDRESS] and task[TILE_COUNT] > 0:
            hand_in_all(w, bias_sums)

    return backward_kernel
