// Groups of 8 tokens, their bands, and what a block of the banded backward keeps in shared memory.
//
// A problem has three axes here, missing ones with extent and kernel 1; a 1-D problem lies on axis 1.
// All positions are in-group (see window.cuh). Axis 1 counts rows, axis 2 columns.
//
//   group    BAND x GROUP_COLUMNS = 8 tokens: the n8 side of an mma. Token n of a group lies in row
//            n % BAND, column n / BAND, so the two tokens of a lane share their column.
//   block    BLOCK_ROWS x BLOCK_COLUMNS = 16 tokens of the other kind: the m16 side of an mma
//   tile     GROUPS neighbouring groups of one band, which share the blocks they load
//   region   REGION_0 x REGION_1 x REGION_2 tokens: what a thread block owns, as queries and as keys
//
// For queries of a group, the keys that matter lie in the rows of the band's windows (a list, of all
// planes) and in the columns [-QUERY_LEFT, ...) from the group's first: QUERY_BLOCKS blocks of columns.
// For keys of a group, the queries that matter lie alike, with KEY_LEFT and KEY_BLOCKS.
//
//   kernel 7x7, BAND 2, blocks 8 x 2         k k|k k|k k|k k|k k
//                                            k k|k k|k k|k k|k k
//   a group of queries and its five          k k|k k|k k|k k|k k
//   blocks of keys; the next group is        k k|k q|q q|q k|k k
//   two blocks to the right                  k k|k q|q q|q k|k k
//                                            k k|k k|k k|k k|k k
//                                            k k|k k|k k|k k|k k
//                                            k k|k k|k k|k k|k k
//
// Some groups near a border need columns beyond these; each takes them in extra blocks of its own.
//
// Where a tile is as wide as the map (DENSE), its groups share all blocks, counted from the tile's first column.
//
// A thread block walks down the map, a band of regions after another; rows live in rings, so that the next
// region's rows arrive while this one's are worked on.
//
// Defines: ELEMENT, RPB (undefined = no bias), HEAD_DIM, HEAD_DIM_V, THREADS, QUERY_WARPS, those
// above; for keys around queries (KEY_) and queries around keys (QUERY_), planes SPAN_0 and rows RING of
// shared memory, its COLUMNS and how many of them lie left of the region, PAD; of bands of queries (QUERY_) and
// of keys (KEY_), the length of the longest LIST of rows, in whole blocks; the bias table's LEAST_DIFFERENCE and
// TABLE_ROW; SHARED, the bytes of shared memory; and for a = 0, 1, 2: KERNEL_a, STRIDE_a, CAUSAL_a, DILATION_a.
#pragma once

#include "common/anew.cuh"
#include "common/scale.cuh"
#include "common/types.cuh"
#include "common/window.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"

using Element = ELEMENT;
#ifdef RPB
using BiasElement = RPB;
#else
using BiasElement = float32;  // of a null pointer
#endif

constexpr int GROUP_COLUMNS = 8 / BAND, BLOCK_COLUMNS = 16 / BLOCK_ROWS;
constexpr int STEP = DENSE ? 0 : GROUP_COLUMNS / BLOCK_COLUMNS;  // blocks from one group's first to the next one's
constexpr int ROW_HALVES = BLOCK_ROWS / 8;  // row lists of a lane of an m16 accumulator
constexpr int TILE_COLUMNS = GROUPS * GROUP_COLUMNS;
constexpr int BANDS = REGION_0 * REGION_1 / BAND, TILES = REGION_2 / TILE_COLUMNS;
static_assert(BAND == 2 || BAND == 4 || BAND == 8, "the two tokens of a lane share their column");
static_assert(BLOCK_ROWS == 8 || BLOCK_ROWS == 16, "matrices of 8 x 8 are 8 rows of one column");
static_assert(GROUP_COLUMNS % BLOCK_COLUMNS == 0, "groups start where blocks start");
static_assert(REGION_1 % BAND == 0 && REGION_2 % TILE_COLUMNS == 0, "a region is whole tiles");
static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM_V % 8 == 0, "rows are whole 16-byte chunks");

constexpr int D_STEPS = (HEAD_DIM + 15) / 16, V_STEPS = (HEAD_DIM_V + 15) / 16;  // of 16 elements

// ---- shared memory, in bytes ----

constexpr int D_TOKEN = D_STEPS * 32, V_TOKEN = V_STEPS * 32;

// Rows are an odd number of 16-byte chunks apart, so that 8 rows of a column miss each other's banks.
__device__ constexpr int odd_chunks(int bytes) { return (bytes / 16 | 1) * 16; }
constexpr int K_ROW = odd_chunks(KEY_COLUMNS * D_TOKEN), V_ROW = odd_chunks(KEY_COLUMNS * V_TOKEN);
constexpr int Q_ROW = odd_chunks(QUERY_COLUMNS * D_TOKEN), G_ROW = odd_chunks(QUERY_COLUMNS * V_TOKEN);
constexpr int KEY_ROWS = KEY_SPAN_0 * KEY_RING, QUERY_ROWS = QUERY_SPAN_0 * QUERY_RING;

// The bias table of one head, in units of 1 / scale and with the mask of the columns: one variant for each
// offset, 0 to 1 - KERNEL_2, from a query's column to its window's first. A table row is one difference
// key - query of planes and rows; the last one holds nothing but the mask's infinity. Entries of a row are
// differences of columns from LEAST_DIFFERENCE on; TABLE_ROW is such that 8 rows miss each other's banks.
constexpr int ROW_DIFFERENCES = 2 * KERNEL_1 - 1, COLUMN_DIFFERENCES = 2 * KERNEL_2 - 1;
constexpr int TABLE_ROWS = (2 * KERNEL_0 - 1) * ROW_DIFFERENCES;
// Where a band's rows fill a block, the row that a query lacks is one beyond its window: modulo 8, there.
constexpr int MASKED_ROW = TABLE_ROWS + ((2 * KERNEL_1 - KERNEL_1 / 2 - 1) % 8 + 8 - TABLE_ROWS % 8) % 8;
constexpr int TABLE_VARIANT = (MASKED_ROW + 1) * TABLE_ROW;
constexpr int ENTRIES = TABLE_ROWS * COLUMN_DIFFERENCES;  // of one head's bias
static_assert(TABLE_ROW % 8 == 4, "4-byte words of 8 rows and 4 columns lie in 32 banks");

constexpr int STAGE_ROW = odd_chunks(D_TOKEN > V_TOKEN ? D_TOKEN : V_TOKEN), STAGE = 8 * STAGE_ROW;

// What the tiles of a band share, made once a step: the band's own rows and the list of rows that meet it.
template <int LIST>
struct Band {
  int plane, row, rows, count;       // the list: its first plane and row, counted from the band's; rows of a plane; all
  int height;                        // rows of the band within the map; 0: no such band
  unsigned short own[BAND];          // slots
  unsigned short slot[LIST];         // of the list's rows; beyond its end, the last one's
  unsigned short table[LIST][BAND];  // where the bias table's row of each pair of rows starts
};

// What the tiles of a step share. Bands of queries have lists of keys and the other way round.
struct Tables {
  Band<QUERY_LIST> queries[BANDS];
  Band<KEY_LIST> keys[BANDS];
  int column[QUERY_COLUMNS];                             // each query column's place in the bias table
  unsigned char query_extra[TILES], key_extra[TILES];  // whether some group takes extra blocks
};

constexpr int K_AT = 0, V_AT = K_AT + KEY_ROWS * K_ROW;
constexpr int Q_AT = V_AT + KEY_ROWS * V_ROW, G_AT = Q_AT + QUERY_ROWS * Q_ROW;
constexpr int SCALARS_AT = G_AT + QUERY_ROWS * G_ROW;
constexpr int TABLES_AT = SCALARS_AT + QUERY_ROWS * QUERY_COLUMNS * 8;  // the present step's, the next one's
constexpr int BIAS_AT = (TABLES_AT + 2 * static_cast<int>(sizeof(Tables)) + 15) / 16 * 16;
constexpr int STAGE_AT = (BIAS_AT + KERNEL_2 * TABLE_VARIANT * 4 + 15) / 16 * 16;
constexpr int SUMS_AT = STAGE_AT + (THREADS / 32) * STAGE;  // of drpb, one table for each warp of queries
constexpr int STEPS_AT = (SUMS_AT + QUERY_WARPS * ENTRIES * 4 + 15) / 16 * 16, STEP_BYTES = 224;
constexpr int LOADED_AT = STEPS_AT + 3 * STEP_BYTES, DONE_AT = LOADED_AT + 8;  // barriers
constexpr int PLACES_AT = DONE_AT + 8;  // how far each warp is
static_assert(PLACES_AT + THREADS / 32 * 4 <= SHARED, "natcore/planning/banded_geometry.py counts as much");

// ---- sizes and strides: written by natcore/planning/banded.py ----

struct Sizes {
  int extent[3], regions[3];  // of the map; regions of the longest dilation group
  int batch, heads, slices;   // blocks that share a head
};

struct Layout {  // strides in elements; `step` is that of neighbours in a dilation group
  long long batch;
  int head, axis[3], step[3];
};

__device__ __forceinline__ long long distance(const Layout& s, int x0, int x1, int x2) {
  return static_cast<long long>(x0) * s.step[0] + static_cast<long long>(x1) * s.step[1] +
         static_cast<long long>(x2) * s.step[2];
}

template <typename T>
__device__ __forceinline__ T* shifted(T* pointer, const Layout& s, int x0, int x1, int x2) {
  return pointer + distance(s, x0, x1, x2);
}

__device__ constexpr int of_axis(int a, int x0, int x1, int x2) { return a == 0 ? x0 : a == 1 ? x1 : x2; }

__device__ __forceinline__ Axis window_of(int a) {
  return {0, of_axis(a, KERNEL_0, KERNEL_1, KERNEL_2), of_axis(a, STRIDE_0, STRIDE_1, STRIDE_2), 1,
          of_axis(a, CAUSAL_0, CAUSAL_1, CAUSAL_2)};
}

// The thread's lane, warp and block, read anew, so that what comes from them takes no registers across a long loop.
__device__ __forceinline__ int lane_here() {
  unsigned lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane & 31;
}
__device__ __forceinline__ int warp_here() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread / 32;
}
__device__ __forceinline__ unsigned block_here() {
  unsigned block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}

__device__ __forceinline__ float positive_infinity() { return __int_as_float(0x7f800000); }

struct Rows {  // planes [plane, plane + planes) x rows [row, row + rows): a list, row fastest
  int plane, planes, row, rows;
  __device__ __forceinline__ int count() const { return planes * rows; }
  // The i-th of the list as (plane, row); beyond the end, the last.
  __device__ __forceinline__ void at(int i, int& p, int& r) const {
    i = smaller(i, count() - 1);
    p = KERNEL_0 == 1 ? plane : plane + i / rows;  // then there is one plane only
    r = KERNEL_0 == 1 ? row + i : row + i % rows;
  }
};

__device__ __forceinline__ Interval keys_of_range(int a, int first, int last, int length) {
  return {keys_of(window_of(a), first, length).start, keys_of(window_of(a), last, length).end};
}
__device__ __forceinline__ Interval queries_of_range(int a, int first, int last, int length) {
  return {queries_of(window_of(a), first, length).start, queries_of(window_of(a), last, length).end};
}

// Rows of one kind in a ring of shared memory: in-group rows [start, end), the first of them in `slot`.
template <int RING>
struct Ring {
  int start, end, slot;
  __device__ __forceinline__ static int wrapped(int slot) { return slot < RING ? slot : slot - RING; }
  __device__ __forceinline__ int of(int row) const { return wrapped(slot + row - start); }
  // Where rows `next` go: after these or, where the two belong together, in their places.
  __device__ __forceinline__ Ring followed_by(Interval next, bool together) const {
    return {next.start, next.end, wrapped(slot + (together ? next.start : end) - start)};
  }
  __device__ __forceinline__ bool holds(Interval next, bool together) const {
    return (together ? next.end - start : end - start + next.end - next.start) <= RING;
  }
};

// One region of one batch entry and dilation group. Items are numbered rows fastest.
struct Region {
  int batch, group[3], length[3], first[3];
  Interval key_planes, query_planes, key_rows, query_rows;

  __device__ __forceinline__ Region(const Sizes& sizes, int item) {
    first[1] = item % sizes.regions[1] * REGION_1, item /= sizes.regions[1];
    first[0] = item % sizes.regions[0] * REGION_0, item /= sizes.regions[0];
    first[2] = item % sizes.regions[2] * REGION_2, item /= sizes.regions[2];
    constexpr int DILATIONS[3] = {DILATION_0, DILATION_1, DILATION_2};
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      group[a] = DILATIONS[a] == 1 ? 0 : item % DILATIONS[a];
      item /= DILATIONS[a];
      length[a] = (sizes.extent[a] - group[a] + DILATIONS[a] - 1) / DILATIONS[a];
    }
    batch = item;
    const int last[2] = {smaller(first[0] + REGION_0, length[0]) - 1, smaller(first[1] + REGION_1, length[1]) - 1};
    key_planes = keys_of_range(0, first[0], last[0], length[0]);
    query_planes = queries_of_range(0, first[0], last[0], length[0]);
    key_rows = keys_of_range(1, first[1], last[1], length[1]);
    query_rows = queries_of_range(1, first[1], last[1], length[1]);
  }
  __device__ __forceinline__ bool exists() const {
    return first[0] < length[0] && first[1] < length[1] && first[2] < length[2];
  }

  // Where the dilation group's first token lies, in elements, and where the region's does.
  __device__ __forceinline__ long long origin(const Layout& s, int head) const {
    return batch * s.batch + static_cast<long long>(head) * s.head + static_cast<long long>(group[0]) * s.axis[0] +
           static_cast<long long>(group[1]) * s.axis[1] + static_cast<long long>(group[2]) * s.axis[2];
  }
  __device__ __forceinline__ long long offset(const Layout& s, int head) const {
    return origin(s, head) + distance(s, first[0], first[1], first[2]);
  }
};

// A region and where its rows are. Three lie in shared memory: the present one,
// the next one and, being planned, the one after.
struct Step {
  Region region;
  Ring<KEY_RING> keys;
  Ring<QUERY_RING> queries;
  Interval new_keys, new_queries;  // rows to be loaded
  long long d_out, q, k, v, out, lse, d_lse;  // where the dilation group's first token lies
  long long dq, dk, dv;                       // where the region's does
  int width;                       // columns of the map from the region's first on
  int item, end;  // the block's items end there
  int keys_claimed, rows_claimed;  // tiles of keys, and new rows of queries for their scalars, that warps have taken
  bool loaded;    // whether its rows can be fetched during the step before
  __device__ __forceinline__ bool exists() const { return item < end; }
};
static_assert(sizeof(Step) <= STEP_BYTES, "steps are apart");
