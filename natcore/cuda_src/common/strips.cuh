// Groups of 8 queries, strips of the map down which a block marches, and what it keeps in shared memory.
//
// The map has two axes: axis 0 counts rows, axis 1 columns. All positions are in-group (see window.cuh).
//
//   group    BAND x GROUP_COLUMNS = 8 queries: the n8 side of an mma. Query n of a group lies in row n % BAND,
//            column n / BAND, so the two queries of a lane share their column.
//   block    BLOCK_ROWS x BLOCK_COLUMNS = 16 keys: the m16 side of an mma. A band's keys are one row of blocks.
//   tile     GROUPS neighbouring groups of one band, which share the blocks they load: what a warp works on
//   strip    TILES tiles side by side. Every warp of a block has a tile and a head, and keeps them on its way down.
//
//   kernel 7x7, BAND 2, blocks 8 x 2         k k|k k|k k|k k|k k
//                                            k k|k k|k k|k k|k k
//   a group of queries and its five          k k|k k|k k|k k|k k
//   blocks of keys; the next group is        k k|k q|q q|q k|k k
//   two blocks to the right, so that a       k k|k q|q q|q k|k k
//   tile of two groups has seven blocks      k k|k k|k k|k k|k k
//                                            k k|k k|k k|k k|k k
//                                            k k|k k|k k|k k|k k
//
// Rows of keys and values lie in a ring of RING stages of BAND rows: rows [s BAND - SHIFT, (s + 1) BAND - SHIFT) of
// the map are the s-th stage, so that the windows of most bands start where a stage starts. Queries have a ring of
// QUERY_RING bands. A strip of several is PADDED with zeros where its keys leave the map; the row of a strip as wide
// as the map holds COLUMNS, all of it, and keys beyond are whatever finite numbers lie there. The mask removes both.
//
// Defines: ELEMENT, RPB (undefined = no bias), HEAD_DIM, HEAD_DIM_V; BAND, BLOCK_ROWS, GROUPS, TILES, HEADS (of a
// block), BLOCKS (of a group), LEFT (columns from a group's first block to its first query, at most), COLUMNS (of
// shared memory), PADDED, SHIFT, RING, QUERY_RING, PRODUCERS (warps), BLOCKS_PER_SM; and for a = 0, 1: KERNEL_a,
// STRIDE_a, CAUSAL_a, DILATION_a.
#pragma once

#include "common/shared_rows.cuh"
#include "common/types.cuh"
#include "common/window.cuh"

using Element = ELEMENT;
#ifdef RPB
using BiasElement = RPB;
#else
using BiasElement = float32;  // of a null pointer
#endif

constexpr int GROUP_COLUMNS = 8 / BAND, BLOCK_COLUMNS = 16 / BLOCK_ROWS;
constexpr bool TALL = BLOCK_ROWS == 16;
constexpr int STEP = GROUP_COLUMNS / BLOCK_COLUMNS;  // blocks from one group's first to the next one's
constexpr int TILE_BLOCKS = (GROUPS - 1) * STEP + BLOCKS;
constexpr int TILE = GROUPS * GROUP_COLUMNS, STRIP = TILES * TILE;  // columns
constexpr int CONSUMERS = HEADS * TILES, THREADS = 32 * (CONSUMERS + PRODUCERS);
constexpr int D_STEPS = (HEAD_DIM + 15) / 16, V_STEPS = (HEAD_DIM_V + 15) / 16;  // of 16 elements

static_assert(GROUP_COLUMNS % BLOCK_COLUMNS == 0, "groups start where blocks start");
static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM_V % 8 == 0, "rows are whole 16-byte chunks");
static_assert(BLOCKS * BLOCK_COLUMNS <= 16, "the mask's product has 16 columns");

// ---- shared memory, in bytes ----

// The chunks of 16 bytes of a row of keys or values are permuted by the map's row, within each 128 bytes, so that 8
// rows of a column miss each other's banks wherever in the ring they lie; rows whose blocks do not start at 128 bytes
// are an odd number of chunks apart instead. Chunks of queries are permuted such that a group's 8 miss each other's.
template <int STEPS>  // of 16 elements of a head
struct KeyRows {
  static constexpr int TOKEN = HEADS * STEPS * 32, BYTES = COLUMNS * TOKEN;
  static constexpr bool PERMUTED = BLOCK_COLUMNS * TOKEN % 128 == 0;
  static constexpr int PITCH = PERMUTED ? (BYTES + 127) / 128 * 128 : (BYTES / 16 | 1) * 16;
  static __device__ __forceinline__ int at(int byte, int row) { return PERMUTED ? byte ^ row % 8 * 16 : byte; }
};
using K = KeyRows<D_STEPS>;
using V = KeyRows<V_STEPS>;

struct QueryRows {
  static constexpr int TOKEN = K::TOKEN, PITCH = (STRIP * TOKEN + 127) / 128 * 128;
  static constexpr int LINES = TOKEN > 128 ? TOKEN / 128 : 1;  // of a token
  static __device__ __forceinline__ int at(int byte, int row) {
    return byte ^ (row % BAND + BAND * (byte / 128 / LINES)) % 8 * 16;
  }
};

// The bias table of one head, in units of 1 / scale: a row for each difference key - query of rows, then a row of
// infinities for queries that lack the key's row; within a row, differences of columns from LEAST_DIFFERENCE on. The
// first of two tables holds infinities where an unclamped window lacks the column too.
constexpr int LEAST_DIFFERENCE = 1 - GROUP_COLUMNS - (GROUPS > 1 ? LEFT : BLOCKS * BLOCK_COLUMNS - 1);
constexpr int GREATEST_DIFFERENCE = BLOCKS * BLOCK_COLUMNS - 1 - (GROUPS > 1 ? LEFT : 0);
constexpr int TABLE_ROWS = 2 * KERNEL_0 - 1;
// Where a band's rows fill a block, the row that a query lacks is one beyond its window: modulo 8, there.
constexpr int MASKED_ROW = TABLE_ROWS + ((2 * KERNEL_0 - KERNEL_0 / 2 - 1) % 8 + 8 - TABLE_ROWS % 8) % 8;
constexpr int TABLE_ROW = (GREATEST_DIFFERENCE - LEAST_DIFFERENCE + 4) / 8 * 8 + 4;  // 8 rows of 4 lie in 32 banks
constexpr int TABLE = (MASKED_ROW + 1) * TABLE_ROW;

using OutRows = Rows<V_STEPS * 16>;
constexpr int OUT_STAGE = GROUPS * 8 * OutRows::PITCH;

// Blocks of columns leave the map so far, on either side, where a row of shared memory is the map's.
constexpr int RIGHT = BLOCKS * BLOCK_COLUMNS - (GROUPS == 1 ? COLUMNS : GROUP_COLUMNS + LEFT);
constexpr int OUTSIDE = GROUPS == 1 || LEFT < RIGHT ? RIGHT : LEFT, MARGIN = PADDED || OUTSIDE < 0 ? 0 : OUTSIDE;
__device__ constexpr int margin_of(int token) { return (MARGIN * token + 127) / 128 * 128; }
constexpr int K_AT = margin_of(K::TOKEN);
constexpr int K_END = (K_AT + RING * BAND * K::PITCH + 127) / 128 * 128 + margin_of(K::TOKEN);
constexpr int V_AT = K_END + margin_of(V::TOKEN);
constexpr int Q_AT = (V_AT + RING * BAND * V::PITCH + 127) / 128 * 128 + margin_of(V::TOKEN);
constexpr int OUT_AT = Q_AT + QUERY_RING * BAND * QueryRows::PITCH;
constexpr int TABLE_AT = OUT_AT + CONSUMERS * OUT_STAGE;
constexpr int BARRIERS_AT = TABLE_AT + HEADS * 2 * TABLE * 4;
constexpr int SHARED_BYTES = BARRIERS_AT + 2 * (RING + QUERY_RING) * 8;

// ---- sizes and strides: written by natcore/planning/marching.py ----

struct Sizes {
  int extent[2], batch, heads_per_kv;
  int bands, strips;       // of the longest dilation group
  int head_groups, slices;  // blocks that share HEADS heads
};

struct Layout {  // strides in elements; `step` is that of neighbours in a dilation group
  long long batch;
  int head, axis[2], step[2];
};

struct Params {
  Sizes sizes;
  Layout q, k, v, rpb, out, lse;
};

__device__ __forceinline__ Axis window_of(int a) {
  return {0, a == 0 ? KERNEL_0 : KERNEL_1, a == 0 ? STRIDE_0 : STRIDE_1, 1, a == 0 ? CAUSAL_0 : CAUSAL_1};
}

// Consecutive bands of one strip of one batch entry and dilation group. Items are numbered bands fastest.
struct Run {
  int batch, group[2], length[2];
  int start, owned;       // the strip's first column, moved back inside the map; the first that it stores
  int first, last, next;  // bands; the item after this run

  __device__ __forceinline__ Run(const Sizes& sizes, int item, int end) {
    int rest = item / sizes.bands;
    first = item - rest * sizes.bands;
    next = smaller(item + sizes.bands - first, end);
    int number = 0;
    if (PADDED) {  // there are several strips
      number = rest % sizes.strips;
      rest /= sizes.strips;
    }
    group[1] = DILATION_1 == 1 ? 0 : rest % DILATION_1;
    rest /= DILATION_1;
    group[0] = DILATION_0 == 1 ? 0 : rest % DILATION_0;
    batch = rest / DILATION_0;
    length[0] = (sizes.extent[0] - group[0] + DILATION_0 - 1) / DILATION_0;
    length[1] = (sizes.extent[1] - group[1] + DILATION_1 - 1) / DILATION_1;
    owned = number * STRIP;
    start = smaller(owned, larger(length[1] - STRIP, 0));
    last = smaller(first + next - item, (length[0] + BAND - 1) / BAND) - 1;
    if (owned >= length[1]) last = first - 1;
  }

  // Where in-group position (0, 0) lies.
  template <typename T>
  __device__ __forceinline__ T* base(T* pointer, const Layout& s, int head) const {
    return pointer + (batch * s.batch + static_cast<long long>(head) * s.head +
                      static_cast<long long>(group[0]) * s.axis[0] + static_cast<long long>(group[1]) * s.axis[1]);
  }

  // The rows that a band's queries see.
  __device__ __forceinline__ Interval rows_of(int band) const {
    const int y = band * BAND;
    return {keys_of(window_of(0), y, length[0]).start,
            keys_of(window_of(0), smaller(y + BAND, length[0]) - 1, length[0]).end};
  }
  // The column of the map that lies first in a row of shared memory.
  __device__ __forceinline__ int origin() const { return PADDED ? start - LEFT : 0; }
};

__device__ __forceinline__ int stage_of(int row) { return (row + SHIFT) / BAND; }

// A place in a ring of barriers: which one, and the parity of its phase.
template <int COUNT>
struct Turn {
  int slot = 0;
  unsigned phase = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == COUNT) slot = 0, phase ^= 1;
  }
};

// The barriers: stages of keys full and empty, bands of queries full and empty.
struct Barriers {
  unsigned base;
  __device__ __forceinline__ unsigned full(int slot) const { return base + slot * 8; }
  __device__ __forceinline__ unsigned empty(int slot) const { return base + (RING + slot) * 8; }
  __device__ __forceinline__ unsigned queries_full(int slot) const { return base + (2 * RING + slot) * 8; }
  __device__ __forceinline__ unsigned queries_empty(int slot) const {
    return base + (2 * RING + QUERY_RING + slot) * 8;
  }
};
