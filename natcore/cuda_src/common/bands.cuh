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
// Defines: ELEMENT, RPB (undefined = no bias), HEAD_DIM, HEAD_DIM_V, those above, the rows and planes of
// the longest spans, KEY_SPAN_0, KEY_SPAN_1, QUERY_SPAN_0, QUERY_SPAN_1, and for a = 0, 1, 2: KERNEL_a,
// STRIDE_a, CAUSAL_a, DILATION_a.
#pragma once

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

constexpr float LOG2_E = 1.4426950408889634f;

constexpr int GROUP_COLUMNS = 8 / BAND, BLOCK_COLUMNS = 16 / BLOCK_ROWS, STEP = GROUP_COLUMNS / BLOCK_COLUMNS;
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

constexpr int KEY_COLUMNS = REGION_2 - GROUP_COLUMNS + QUERY_BLOCKS * BLOCK_COLUMNS;
constexpr int QUERY_COLUMNS = (REGION_2 - GROUP_COLUMNS + KEY_BLOCKS * BLOCK_COLUMNS + 1) / 2 * 2;
constexpr int D_TOKEN = D_STEPS * 32, V_TOKEN = V_STEPS * 32;

// Rows are an odd number of 16-byte chunks apart, so that 8 rows of a column miss each other's banks.
__device__ constexpr int odd_chunks(int bytes) { return (bytes / 16 | 1) * 16; }
constexpr int K_ROW = odd_chunks(KEY_COLUMNS * D_TOKEN), V_ROW = odd_chunks(KEY_COLUMNS * V_TOKEN);
constexpr int Q_ROW = odd_chunks(QUERY_COLUMNS * D_TOKEN), G_ROW = odd_chunks(QUERY_COLUMNS * V_TOKEN);
constexpr int KEY_ROWS = KEY_SPAN_0 * KEY_SPAN_1, QUERY_ROWS = QUERY_SPAN_0 * QUERY_SPAN_1;

// The bias table of one head, in units of 1 / scale and with the mask of the columns: one variant for each
// offset, 0 to 1 - KERNEL_2, from a query's column to its window's first. A table row is one difference
// key - query of planes and rows; the last one holds nothing but the mask's infinity.
constexpr int LEAST_DIFFERENCE = (QUERY_LEFT + GROUP_COLUMNS - 1 > KEY_BLOCKS * BLOCK_COLUMNS - 1 - KEY_LEFT)
                                     ? -(QUERY_LEFT + GROUP_COLUMNS - 1)
                                     : KEY_LEFT - (KEY_BLOCKS * BLOCK_COLUMNS - 1);
constexpr int GREATEST_DIFFERENCE = (QUERY_BLOCKS * BLOCK_COLUMNS - 1 - QUERY_LEFT > GROUP_COLUMNS - 1 + KEY_LEFT)
                                        ? QUERY_BLOCKS * BLOCK_COLUMNS - 1 - QUERY_LEFT
                                        : GROUP_COLUMNS - 1 + KEY_LEFT;
constexpr int TABLE_ROW = (GREATEST_DIFFERENCE - LEAST_DIFFERENCE + 1 + 3) / 8 * 8 + 4;  // floats; 8 rows miss each other
constexpr int ROW_DIFFERENCES = 2 * KERNEL_1 - 1, COLUMN_DIFFERENCES = 2 * KERNEL_2 - 1;
constexpr int MASKED_ROW = (2 * KERNEL_0 - 1) * ROW_DIFFERENCES;
constexpr int TABLE_VARIANT = (MASKED_ROW + 1) * TABLE_ROW;
constexpr int ENTRIES = MASKED_ROW * COLUMN_DIFFERENCES;  // of one head's bias
static_assert(TABLE_ROW >= GREATEST_DIFFERENCE - LEAST_DIFFERENCE + 1, "a row holds every difference");

constexpr int STAGE_ROW = odd_chunks(D_TOKEN > V_TOKEN ? D_TOKEN : V_TOKEN), STAGE = 8 * STAGE_ROW;

constexpr int K_AT = 0, V_AT = K_AT + KEY_ROWS * K_ROW;
constexpr int Q_AT = V_AT + KEY_ROWS * V_ROW, G_AT = Q_AT + QUERY_ROWS * Q_ROW;
constexpr int SCALARS_AT = G_AT + QUERY_ROWS * G_ROW;
constexpr int COLUMNS_AT = SCALARS_AT + QUERY_ROWS * QUERY_COLUMNS * 8;
constexpr int TABLE_AT = (COLUMNS_AT + QUERY_COLUMNS * 4 + 15) / 16 * 16;
constexpr int STAGE_AT = (TABLE_AT + KERNEL_2 * TABLE_VARIANT * 4 + 15) / 16 * 16;
constexpr int SUMS_AT = STAGE_AT + (THREADS / 32) * STAGE;  // of drpb, one table for each warp of queries
constexpr int SHARED_BYTES = SUMS_AT + QUERY_WARPS * ENTRIES * 4;

// ---- sizes and strides: written by natcore/planning/banded.py ----

struct Sizes {
  int extent[3], regions[3];  // of the map; regions of the longest dilation group
  int batch, heads, slices;   // blocks that share a head
};

struct Layout {  // strides in elements; `step` is that of neighbours in a dilation group
  long long batch;
  int head, axis[3], step[3];
};

__device__ constexpr int of_axis(int a, int x0, int x1, int x2) { return a == 0 ? x0 : a == 1 ? x1 : x2; }

__device__ __forceinline__ Axis window_of(int a) {
  return {0, of_axis(a, KERNEL_0, KERNEL_1, KERNEL_2), of_axis(a, STRIDE_0, STRIDE_1, STRIDE_2), 1,
          of_axis(a, CAUSAL_0, CAUSAL_1, CAUSAL_2)};
}

__device__ __forceinline__ float positive_infinity() { return __int_as_float(0x7f800000); }

struct Rows {  // planes [plane, plane + planes) x rows [row, row + rows): a list, row fastest
  int plane, planes, row, rows;
  __device__ __forceinline__ int count() const { return planes * rows; }
  // The i-th of the list as (plane, row); beyond the end, the last.
  __device__ __forceinline__ void at(int i, int& p, int& r) const {
    i = smaller(i, count() - 1);
    p = KERNEL_0 == 1 && REGION_0 == 1 ? plane : plane + i / rows;
    r = KERNEL_0 == 1 && REGION_0 == 1 ? row + i : row + i % rows;
  }
};

__device__ __forceinline__ Interval keys_of_range(int a, int first, int last, int length) {
  return {keys_of(window_of(a), first, length).start, keys_of(window_of(a), last, length).end};
}
__device__ __forceinline__ Interval queries_of_range(int a, int first, int last, int length) {
  return {queries_of(window_of(a), first, length).start, queries_of(window_of(a), last, length).end};
}

// One region of one batch entry and dilation group.
struct Region {
  int batch, group[3], length[3], first[3];
  Interval keys[2], queries[2];  // spans of planes and rows
  bool exists;

  __device__ __forceinline__ Region(const Sizes& sizes, int item) {
    exists = true;
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      first[a] = item % sizes.regions[a] * of_axis(a, REGION_0, REGION_1, REGION_2);
      item /= sizes.regions[a];
    }
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      constexpr_dilation(a, item);
      length[a] = (sizes.extent[a] - group[a] + dilation(a) - 1) / dilation(a);
      exists &= first[a] < length[a];
    }
    batch = item;
    if (!exists) return;
#pragma unroll
    for (int a = 0; a < 2; ++a) {
      const int last = smaller(first[a] + of_axis(a, REGION_0, REGION_1, REGION_2), length[a]) - 1;
      keys[a] = keys_of_range(a, first[a], last, length[a]);
      queries[a] = queries_of_range(a, first[a], last, length[a]);
    }
  }
  __device__ static constexpr int dilation(int a) { return of_axis(a, DILATION_0, DILATION_1, DILATION_2); }
  __device__ __forceinline__ void constexpr_dilation(int a, int& item) {
    group[a] = item % dilation(a);
    item /= dilation(a);
  }

  // Where in-group position (0, 0, 0) lies.
  template <typename T>
  __device__ __forceinline__ T* base(T* pointer, const Layout& s, int head) const {
    return pointer + (batch * s.batch + static_cast<long long>(head) * s.head +
                      static_cast<long long>(group[0]) * s.axis[0] + static_cast<long long>(group[1]) * s.axis[1] +
                      static_cast<long long>(group[2]) * s.axis[2]);
  }
};

template <typename T>
__device__ __forceinline__ T* shifted(T* pointer, const Layout& s, int x0, int x1, int x2) {
  return pointer + (static_cast<long long>(x0) * s.step[0] + static_cast<long long>(x1) * s.step[1] +
                    static_cast<long long>(x2) * s.step[2]);
}

// ---- filling shared memory ----

// A span of rows of D elements; columns outside the map become zeros.
template <int D, int TOKEN, int ROW, int COLUMNS, int SPAN_1>
__device__ __forceinline__ void load_span(unsigned shared, const Element* base, const Layout& s, const Region& region,
                                          const Interval (&span)[2], int left) {
  constexpr int CHUNKS = D / 8;
  const int rows = span[1].end - span[1].start, count = (span[0].end - span[0].start) * rows;
  const int first = region.first[2] - left;
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < count; i += THREADS / 32) {
    const int plane = KERNEL_0 == 1 && REGION_0 == 1 ? 0 : i / rows, row = i - plane * rows;
    const Element* source = shifted(base, s, span[0].start + plane, span[1].start + row, 0);
    const unsigned target = shared + (plane * SPAN_1 + row) * ROW;
#pragma unroll
    for (int at = 0; at < COLUMNS * CHUNKS; at += 32) {
      const int c = at + threadIdx.x % 32, column = c / CHUNKS, chunk = c % CHUNKS, x = first + column;
      const bool inside = 0 <= x && x < region.length[2];
      if (at + 32 <= COLUMNS * CHUNKS || c < COLUMNS * CHUNKS)
        cp_async_16(target + column * TOKEN + chunk * 16,
                    source + (inside ? static_cast<long long>(x) * s.step[2] : 0) + chunk * 8, inside);
    }
  }
}

// Rows of D elements end in the middle of an mma's k16 or m16: the other half is zeros, written once.
template <int D, int TOKEN, int ROW, int COLUMNS>
__device__ __forceinline__ void clear_padding(unsigned char* shared, int rows) {
  if (D % 16 == 0) return;
  for (int i = threadIdx.x; i < rows * COLUMNS; i += THREADS)
    *reinterpret_cast<uint4*>(shared + i / COLUMNS * ROW + i % COLUMNS * TOKEN + D * 2) = uint4{0, 0, 0, 0};
}

// The unit in which S is computed, never 0, so that a bias keeps its place beside S whatever the scale.
__device__ __forceinline__ float unit_of(float scale) {
  return fabsf(scale) < 1e-30f ? copysignf(1e-30f, scale) : scale;
}

__device__ __forceinline__ void fill_table(float* table, const BiasElement* rpb, const Layout& s, float unit) {
  const float masked = copysignf(positive_infinity(), -unit), factor = 1.f / unit;
  for (int i = threadIdx.x; i < KERNEL_2 * TABLE_VARIANT; i += THREADS) {
    const int start = -(i / TABLE_VARIANT), row = i / TABLE_ROW % (MASKED_ROW + 1);
    const int difference = i % TABLE_ROW + LEAST_DIFFERENCE, end = CAUSAL_2 ? 1 : start + KERNEL_2;
    float x = masked;
    if (row < MASKED_ROW && start <= difference && difference < end) {
      x = 0.f;
#ifdef RPB
      x = factor * widen(rpb[row / ROW_DIFFERENCES * s.axis[0] + row % ROW_DIFFERENCES * s.axis[1] +
                             (difference + KERNEL_2 - 1) * s.axis[2]]);
#endif
    }
    table[i] = x;
  }
}

// Of a query's column: its variant's place in the table, in floats.
__device__ __forceinline__ int variant_of(int x, int length) {
  x = smaller(larger(x, 0), length - 1);  // overhanging columns are masked by their scalars
  return (x - keys_of(window_of(2), x, length).start) * TABLE_VARIANT;
}

// The table row of a pair; the masked one where the query's window lacks the key's row.
__device__ __forceinline__ int table_row(const Region& region, int q0, int q1, int k0, int k1) {
  const Interval seen = keys_of(window_of(1), q1, region.length[1]);
  const bool sees = q1 < region.length[1] && seen.start <= k1 && k1 < seen.end;
  return sees ? (k0 - q0 + KERNEL_0 - 1) * ROW_DIFFERENCES + k1 - q1 + KERNEL_1 - 1 : MASKED_ROW;
}
