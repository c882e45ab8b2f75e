// Bias and mask of a tile: the accumulators that its scores start from.
//
// Where strides are 1 and no window of the tile is clamped, both depend on the difference key - query
// alone, and one table holds them: bias inside the relative window, -infinity outside. Any other tile
// reads the bias from a second, unmasked table and clears scores by the bits of its rows' windows: the
// window of a query is a box, so the bits of 32 keys are put together from one word per axis.
//
// Where rows of the halo are even, a lane reads the two columns it holds as one pair of floats: each table
// lies there twice, the second copy one float on, so that every pair is aligned in one of them.
#pragma once

#include "common/scale.cuh"
#include "common/tiles.cuh"

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

constexpr bool PAIRS = HALO_2 % 2 == 0 && TABLE_ROW % 2 == 0;
constexpr int COPIES = PAIRS ? 2 : 1;
constexpr int TABLES = 2 * COPIES * TABLE_COPY;  // floats

// The masked table, then the other one; entry (d0, d1, d2) is of the differences d_a + first_difference_of(a).
__device__ __forceinline__ void fill_tables(float* tables, const BiasElement* rpb, const Layout& s, float factor) {
  constexpr int ENTRIES = DIFFERENCES_0 * TABLE_PLANE;
#pragma unroll 2  // nothing else hides the latency of its loads
  for (int n = 0; n < (ENTRIES + THREADS - 1) / THREADS; ++n) {
    const int i = threadIdx.x + n * THREADS;
    if (i >= ENTRIES) continue;
    const int at[3] = {i / TABLE_PLANE, i / TABLE_ROW % DIFFERENCES_1, i % TABLE_ROW};
    bool entry = true, seen = true;
    int offset = 0;
#pragma unroll
    for (int a = 0; a < 3; ++a) {
      const int difference = at[a] + first_difference_of(a), last = kernel_of(a) - 1;
      entry &= -last <= difference && difference <= last;
      const int first = causal_of(a) ? -last : -(kernel_of(a) / 2);
      seen &= first <= difference && difference < first + kernel_of(a);
      offset += (difference + last) * s.axis[a];
    }
    float bias = 0.f;
#ifdef RPB
    if (entry) bias = widen(rpb[offset]) * factor;
#endif
#pragma unroll
    for (int copy = 0; copy < COPIES; ++copy) {
      tables[copy * TABLE_COPY + i + copy] = seen ? bias : negative_infinity();
      tables[(COPIES + copy) * TABLE_COPY + i + copy] = bias;
    }
  }
}

struct TileMask {
  unsigned bits[2][3];  // of rows g and g + 8 and each axis; for a long row, the ends of its interval

  TileMask() = default;
  __device__ __forceinline__ TileMask(const Tile& tile, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      bool sees = true;
#pragma unroll
      for (int a = 0; a < 3; ++a) {
        const int query = tile.query[a] + row_axis(a, lane / 4 + 8 * h);
        sees &= query < tile.length[a];
        const Interval seen = keys_of(window_of(a), query, tile.length[a]);
        const int key = tile.query[a] + tile.shift[a], start = seen.start - key, end = seen.end - key;
        if (a == 2 && HALO_2 > 32) {
          bits[h][2] = start, bits[h][1] = sees ? end : 0;
        } else {
          bits[h][a] = (0xffffffffu >> (32 - (end - start))) << start;
        }
      }
      if (!sees) bits[h][HALO_2 > 32 ? 1 : 2] = 0;
    }
  }

  // The bits of keys 32 word ... + 31 for row g + 8 h, shifted so that bit 8 j + e is this lane's.
  __device__ __forceinline__ unsigned word(int word, int h, int lane) const {
    unsigned seen = 0;
    if (HALO_2 > 32) {
      const int start = larger(static_cast<int>(bits[h][2]) - 32 * word, 0);
      const int end = smaller(static_cast<int>(bits[h][1]) - 32 * word, 32);
      seen = start < end ? (0xffffffffu >> (32 - (end - start))) << start : 0;
    } else {
#pragma unroll
      for (int row = 0; row < HALO_0 * HALO_1; ++row) {
        const int at = row * HALO_2 - 32 * word;
        if (at >= 32 || at + HALO_2 <= 0) continue;
        unsigned is = bits[h][1] >> (row % HALO_1);
        if (HALO_0 > 1) is &= bits[h][0] >> (row / HALO_1);
        const unsigned x = is & 1 ? bits[h][2] : 0;
        seen |= at >= 0 ? x << (at & 31) : x >> (-at & 31);
      }
    }
    return seen >> (lane % 4 * 2);
  }
};

// Where the pair (row g, key 0) of a tile lies in the masked table or in the other one.
__device__ __forceinline__ int table_offset(const Tile& tile, bool masked, int lane) {
  int at[3];
#pragma unroll
  for (int a = 0; a < 3; ++a) at[a] = tile.shift[a] - first_difference_of(a) - row_axis(a, lane / 4);
  int offset = at[0] * TABLE_PLANE + at[1] * TABLE_ROW + at[2];
  if (PAIRS) offset += (offset & 1) * (TABLE_COPY + 1);
  return offset + (masked ? 0 : COPIES * TABLE_COPY);
}

// The accumulators of block j. `bias` is at the tile's offset in its table; `words` of this block's keys.
template <bool INTERIOR>
__device__ __forceinline__ void initial_scores(float (&s)[4], int j, const float* bias, const unsigned (&words)[2],
                                               int lane) {
  constexpr int LOWER = row_axis(0, 8) * TABLE_PLANE + row_axis(1, 8) * TABLE_ROW + row_axis(2, 8);
  const int first = 8 * j, column = lane % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float* row = bias - h * LOWER;
    if (PAIRS) {
      const int even = first + 7 < KEYS ? column : smaller(column, KEYS - 2 - first);
      const float2 pair = *reinterpret_cast<const float2*>(row + key_offset<TABLE_PLANE, TABLE_ROW>(first, even));
      s[2 * h] = pair.x, s[2 * h + 1] = pair.y;
    } else {
      s[2 * h] = row[key_offset<TABLE_PLANE, TABLE_ROW>(first, column)];
      s[2 * h + 1] = row[key_offset<TABLE_PLANE, TABLE_ROW>(first, column + 1)];
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool sees = INTERIOR ? first + 7 < KEYS || first + column + e < KEYS : words[h] >> (8 * (j % 4) + e) & 1;
      if (!sees) s[2 * h + e] = negative_infinity();
    }
  }
}
