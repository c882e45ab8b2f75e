"""The tables of numbers through which Python and the compiled kernels speak: names of their entries.

All tables are int64. Kernels receive the address of one `TASK` and find all else from there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


def _names(number: int, step: int | np.int64 = 1, first: int | np.int64 = 0) -> list[np.int64]:
    """first, first + step, ...: of NumPy's type, because numba compiles a function again for each Python int."""
    return [np.int64(first + step * i) for i in range(number)]


#: The operand table: one row per operand of either direction, and where dk, dv and the gradients of
#: additional keys and values are summed before they are rounded.
ROWS = (
    *("q", "k", "v", "rpb", "additional_keys", "additional_values", "out", "lse"),
    *("d_out", "d_lse", "dq", "dk", "dv", "drpb", "d_additional_keys", "d_additional_values"),
    *("sum_k", "sum_v", "sum_additional_keys", "sum_additional_values"),
    *("dropout_seed", "scores", "weights", "d_scores", "d_weights"),
)
#: Its columns: address, dtype code, strides in bytes (the axis within a row is contiguous).
#: Additional keys run along X; T of their sums is the slab.
COLUMNS = np.int64(7)
ADDRESS, KIND, BATCH, T, Y, X, HEAD = _names(7)
Q, K, V, RPB, EXTRA_K, EXTRA_V, OUT, LSE, D_OUT, D_LSE, DQ, DK, DV, DRPB, D_EXTRA_K, D_EXTRA_V = _names(16, COLUMNS)
SUM_K, SUM_V, SUM_EXTRA_K, SUM_EXTRA_V = _names(4, COLUMNS, 16 * COLUMNS)
DROPOUT_SEED, PLACE_SCORES, PLACE_WEIGHTS, D_PLACE_SCORES, D_PLACE_WEIGHTS = _names(5, COLUMNS, 20 * COLUMNS)

#: What the kernels know of a problem besides; after these, the head of each lane.
SIZES = (
    *("head_dim", "head_dim_v", "extra", "group", "heads_per_tile"),  # group: heads per kv head
    *("dilation_t", "dilation_y", "dilation_x"),
    *("extent_t", "extent_y", "extent_x"),
    *("table_t", "table_y", "table_x"),  # one head's bias table
    *("classes", "chunk", "chunks", "slots"),  # keys worked on at once; most chunks of a tile; bias blocks kept
    *("direct_k", "direct_v"),  # whether keys (values) can be read where they are
    *("direct_sum_k", "direct_sum_v"),  # whether products can be added to sums where they are
    *("heads", "kernel_y", "kernel_x", "places"),  # of a window: its last axes; all keys and the additional ones
    *("dropout_threshold", "dropout_factor"),  # a weight's word is at least this; the bits of a float64
)
(HEAD_DIM, HEAD_DIM_V, EXTRA, GROUP, HEADS_PER_TILE, DILATION_T, DILATION_Y, DILATION_X, EXTENT_T, EXTENT_Y, EXTENT_X,
 TABLE_T, TABLE_Y, TABLE_X, CLASSES, CHUNK, CHUNKS, SLOTS, DIRECT_K, DIRECT_V, DIRECT_SUM_K, DIRECT_SUM_V,
 HEADS, KERNEL_Y, KERNEL_X, PLACES, DROPOUT_THRESHOLD, DROPOUT_FACTOR, LANE_HEAD) = _names(len(SIZES) + 1)  # fmt: skip

#: A piece of work: addresses of the tables, then what part of the problem it is.
TASK = (
    *("operands", "axis_tiles", "tiles", "sizes", "integers", "scratch", "layout", "bias_sums"),
    *("kv", "first_batch", "last_batch", "tile_count", "slab", "clear", "finish"),
)
(AT_OPERANDS, AT_AXIS_TILES, AT_TILES, AT_SIZES, AT_INTEGERS, AT_SCRATCH, AT_LAYOUT, AT_BIAS_SUMS,
 KV, FIRST_BATCH, LAST_BATCH, TILE_COUNT, SLAB, CLEAR, FINISH) = _names(len(TASK))  # fmt: skip

#: Integers that a worker keeps: the tile at hand (batch entry, kv head, first head and how many
#: there are from there on in the group, rows of the axis tiles as offsets, class, slab); an address
#: and the bias table's entry per lane; the owner of each slot for a bias block and of the loaded
#: tables; then, per slot, a record of what its gradient is of; then addresses of keys.
(PLACE_BATCH, PLACE_KV, PLACE_HEAD, PLACE_HEADS, PLACE_T, PLACE_Y, PLACE_X, PLACE_CLASS, PLACE_SLAB) = _names(9)
LANE_ADDRESS, ENTRIES, OWNER = _names(3, 16, 16)
#: A record: entry per lane, keys of the box along y and x, the first key and the number of keys.
RECORD_KEYS_Y, RECORD_KEYS_X, RECORD_FIRST, RECORD_COUNT, RECORD = _names(5, 1, 16)

#: Scratch of a worker in the dtype of the arithmetic; the layout table has the offset of each, and
#: then those of the lists of addresses among the integers.
SCRATCH = (
    *("rows", "q_lanes", "key_rows", "value_rows", "scores", "bias", "bounds", "table", "out_lanes", "state"),
    *("squares", "q_rows", "d_out_rows", "d_out_lanes", "d_scores", "sum_rows", "d_bias"),
    *("place_rows", "d_place_rows", "factors"),
)
LISTS = ("keys", "values", "sums")
(ROW_BUFFER, Q_LANES, KEY_ROWS, VALUE_ROWS, SCORES, BIAS, BOUNDS, TABLE, OUT_LANES, STATE,
 SQUARES, Q_ROWS, D_OUT_ROWS, D_OUT_LANES, D_SCORES, SUM_ROWS, D_BIAS,
 PLACE_ROWS, D_PLACE_ROWS, FACTORS) = _names(len(SCRATCH))  # fmt: skip
KEY_LIST, VALUE_LIST, SUM_LIST = _names(len(LISTS), 1, len(SCRATCH))


#: Elements before and after bias tables (and sums of their gradients): lines of a tile overhang them.
TABLE_BEFORE, TABLE_AFTER = _names(2, 16, 16)

#: Pitches: of rows of one number, and of one row that stands for all.
SINGLE, REPEATED = np.int64(1), np.int64(0)


class Work(NamedTuple):
    """A task inside the kernels: typed pointers."""

    operands: Any
    axis_tiles: Any
    sizes: Any
    integers: Any
    scratch: Any
    layout: Any
