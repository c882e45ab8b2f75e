// A tile's products, S = Q K^T and O^T = V^T P^T, of float32 elements: see common/split.cuh. ldmatrix gathers keys; of
// values each lane reads elements of the two keys whose weights it holds.
// (common/tile_products.cuh has the same functions for 16-bit elements.)
#pragma once

#include "common/split.cuh"
#include "common/tile_copies.cuh"
#include "common/tile_output.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/math.cuh"

constexpr bool LONG_PRODUCTS = true;  // two times all instructions would not fit their cache

// Queries stay in the warp's stage: both parts would take twice the registers.
struct Queries {
  unsigned stage;
  float factor;

  __device__ __forceinline__ Queries(unsigned its_stage, float its_factor, int)
      : stage(its_stage), factor(its_factor) {}
  __device__ __forceinline__ Split<4> step(int c, int lane) const {
    unsigned a[4];
    ldmatrix_x4(a, stage + lane % 16 * K_PITCH + Row<HEAD_DIM>::chunk(lane % 16, 2 * c + lane / 16));
    if (factor != 1.f) {
#pragma unroll
      for (unsigned& element : a) element = __float_as_uint(factor * __uint_as_float(element));
    }
    return Split<4>(a, true);
  }
};

// S += Q K^T over COUNT_STEPS = 1 or 2 steps of elements from step c on, of all blocks.
template <int COUNT_STEPS, int FIRST, int COUNT>
__device__ __forceinline__ void score_steps(float (&s)[COUNT][4], const Queries& query, unsigned keys, int slot, int c,
                                            int lane) {
  const Split<4> first = query.step(c, lane), second = COUNT_STEPS == 2 ? query.step(c + 1, lane) : first;
  const int place = Row<HEAD_DIM>::chunk(slot + lane % 8, 2 * c + lane / 8 % (2 * COUNT_STEPS));
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    unsigned key[4];
    ldmatrix_x4(key, keys + key_offset<SLOT_PLANE, SLOT_ROW>((FIRST + j) * 8, lane % 8) * K_PITCH + place);
    multiply(s[j], first, Split<2>(key), s[j]);
    if (COUNT_STEPS == 2) multiply(s[j], second, Split<2>(key + 2), s[j]);
  }
}

// S = initial + Q K^T for the keys of COUNT blocks from block FIRST on.
template <int FIRST, int COUNT>
__device__ __forceinline__ void score(float (&s)[COUNT][4], const float (&initial)[COUNT][4], const Queries& query,
                                      unsigned keys, int slot, int lane) {
#pragma unroll
  for (int i = 0; i < 4 * COUNT; ++i) s[i / 4][i % 4] = initial[i / 4][i % 4];
#pragma unroll 1  // instructions of all steps would not fit their cache
  for (int c = 0; c + 1 < D_STEPS; c += 2) score_steps<2, FIRST>(s, query, keys, slot, c, lane);
  if (D_STEPS % 2 == 1) score_steps<1, FIRST>(s, query, keys, slot, D_STEPS - 1, lane);
}

// O += P V for the keys of COUNT blocks from block FIRST on. Each lane sums its own weights.
template <int FIRST, int COUNT>
__device__ __forceinline__ void weigh(Output& output, const float (&p)[COUNT][4], unsigned values, int slot, int lane) {
  const int column = lane % 4 * 2;
  int place[O_TILES / 2][2];  // of the lane's two elements in the slots of its two keys
#pragma unroll
  for (int n = 0; n < O_TILES; n += 2)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int element = smaller(8 * n + lane / 4 * 2, HEAD_DIM_V - 2);  // those beyond are nobody's
      place[n / 2][e] = Row<HEAD_DIM_V>::chunk(slot + column + e, element / 4) + element % 4 * 4;
    }
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    const int first = (FIRST + j) * 8;
    unsigned row[2];  // of the lane's two keys
    if (HALO_2 % 2 == 0) {
      const int even = first + 7 < KEYS ? column : smaller(column, KEYS - 2 - first);
      row[0] = values + key_offset<SLOT_PLANE, SLOT_ROW>(first, even) * V_PITCH, row[1] = row[0] + V_PITCH;
    } else {
#pragma unroll
      for (int e = 0; e < 2; ++e)
        row[e] = values + key_offset<SLOT_PLANE, SLOT_ROW>(first, column + e) * V_PITCH;
    }
    const Split<2> weights[2] = {transposed(p[j], 0), transposed(p[j], 1)};
#pragma unroll
    for (int n = 0; n < O_TILES; n += 2) {
      const Split<4> value = load_transposed(row[0] + place[n / 2][0], row[1] + place[n / 2][1]);
#pragma unroll
      for (int h = 0; h < 2; ++h) multiply(output.o[n + h], value, weights[h], output.o[n + h]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) output.sum[e] += p[j][e];
  }
}

// The factors are of rows g and g + 8.
__device__ __forceinline__ void rescale(Output& output, const float (&factors)[2], int lane) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    output.sum[e] *= factors[e / 2];
    const float its = of_column(factors[e / 2], e % 2, lane);
#pragma unroll
    for (int n = e / 2; n < O_TILES; n += 2) output.o[n][e % 2] *= its, output.o[n][e % 2 + 2] *= its;
  }
}

// What the lanes of a row know together.
__device__ __forceinline__ void complete(Output& output) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = output.sum[2 * h] + output.sum[2 * h + 1];
    sum += __shfl_xor_sync(~0u, sum, 1);
    output.sum[2 * h] = sum + __shfl_xor_sync(~0u, sum, 2);
  }
}

// Where the rows of O that a lane holds lie, from the tile's first.
struct OutputShare {
  int first[4];

  static __device__ __forceinline__ int row(int i, int lane) { return lane % 4 * 2 + i % 2 + i / 2 * 8; }
  __device__ __forceinline__ OutputShare(const Layout& s, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) first[i] = Share<HEAD_DIM_V>::rows(s, row(i, lane));
  }
};

// O / sum to `base`, the tile's first.
__device__ __forceinline__ void store_output(Element* base, unsigned char*, const Layout&, const OutputShare& share,
                                             const Tile& tile, const Output& output, int lane) {
  const int g = lane / 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float inverse = of_column(rcp_approx(output.sum[i / 2 * 2]), i % 2, lane);
    if (!tile.whole && !tile.stores(share.row(i, lane))) continue;
    float2* row = reinterpret_cast<float2*>(base + share.first[i]) + g;
#pragma unroll
    for (int n = 0; n < O_TILES; n += 2) {
      const float(&o)[4] = output.o[n + i / 2];
      if (8 * n + 16 <= HEAD_DIM_V || g < 4) row[4 * n] = float2{o[i % 2] * inverse, o[i % 2 + 2] * inverse};
    }
  }
}
