// Bias and mask of a tile: the accumulators that its scores start from.
//
// Where strides are 1 and no window of the tile is clamped, both depend on the difference key - query
// alone, and one table holds them: bias inside the relative window, -infinity outside. Any other tile
// reads the bias from a second, unmasked table and clears scores by the bits of its rows' windows: the
// window of a query is a box, so the bits of 32 keys are put together from one word per axis.
#pragma once

#include "common/tiles.cuh"

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

// scale = query * unit: S starts from bias / unit and softmax takes exp(unit S). The unit is positive and
// never tiny; a scale that is negative or tiny goes into the queries instead, sign or all of it.
struct ScaleParts {
  float query = 1.f, unit, bias;
  __device__ __forceinline__ explicit ScaleParts(float scale) {
    unit = fabsf(scale);
    if (scale < 0.f) query = -1.f;
    if (unit < 1.f / 4096.f) query = scale, unit = 1.f;
    bias = 1.f / unit;
    unit *= LOG2_E;
  }
};

// Table 0 masked, table 1 not; entry (d0, d1, d2) is of the differences d_a + first_difference_of(a).
__device__ __forceinline__ void fill_tables(float* tables, const BiasElement* rpb, const Layout& s, float factor) {
  for (int i = threadIdx.x; i < TABLE; i += THREADS) {
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
    tables[i] = seen ? bias : negative_infinity();
    tables[TABLE + i] = bias;
  }
}

struct TileMask {
  bool interior = UNCLAMPED;
  unsigned bits[2][3];  // of rows g and g + 8 and each axis; for a long row, the ends of its interval

  __device__ __forceinline__ TileMask(const Region& region, const Tile& tile, int lane) {
#pragma unroll
    for (int a = 0; a < 3; ++a) {
      const int before = causal_of(a) ? kernel_of(a) - 1 : kernel_of(a) / 2, first = tile.query[a] - before;
      interior &= first >= 0 && first + kernel_of(a) + tile_of(a) - 1 <= region.length[a];
    }
    if (interior) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      bool sees = true;
#pragma unroll
      for (int a = 0; a < 3; ++a) {
        const int query = tile.query[a] + row_axis(a, lane / 4 + 8 * h);
        sees &= query < region.length[a];
        const Interval seen = keys_of(window_of(a), query, region.length[a]);
        const int start = seen.start - tile.key[a], end = seen.end - tile.key[a];
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

  // Where in a table the pair (row g, key 0) of the tile lies.
  __device__ __forceinline__ static int table_offset(const Tile& tile, int lane) {
    int at[3];
#pragma unroll
    for (int a = 0; a < 3; ++a)
      at[a] = tile.key[a] - tile.query[a] - first_difference_of(a) - row_axis(a, lane / 4);
    return at[0] * TABLE_PLANE + at[1] * TABLE_ROW + at[2];
  }
};

// The accumulators of block j. `bias` is at the tile's offset in its table; `words` of this block's keys.
template <bool INTERIOR>
__device__ __forceinline__ void initial_scores(float (&s)[4], int j, const float* bias, const unsigned (&words)[2],
                                               int lane) {
  constexpr int LOWER = row_axis(0, 8) * TABLE_PLANE + row_axis(1, 8) * TABLE_ROW + row_axis(2, 8);
  const int first = 8 * j, column = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int e = i % 2, h = i / 2;
    const int offset = HALO_2 % 2 == 0 ? key_offset<TABLE_PLANE, TABLE_ROW>(first, column) + e
                                       : key_offset<TABLE_PLANE, TABLE_ROW>(first, column + e);
    float x = bias[offset - h * LOWER];
    if (INTERIOR) {
      if (first + 7 >= KEYS && first + column + e >= KEYS) x = negative_infinity();
    } else {
      if (!(words[h] >> (8 * (j % 4) + e) & 1)) x = negative_infinity();
    }
    s[i] = x;
  }
}
