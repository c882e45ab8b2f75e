// A tile's products, S = Q K^T and O = P V, of 16-bit elements: ldmatrix gathers keys, and values transposed.
// (common/tile_products_float32.cuh has the same functions for float32.)
#pragma once

#include "common/tile_copies.cuh"
#include "common/tile_output.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"

constexpr bool LONG_PRODUCTS = false;  // interior tiles and others have instructions of their own

// Queries of a warp's stage as A operands, multiplied by `factor`.
struct Queries {
  unsigned a[D_STEPS][4];

  __device__ __forceinline__ Queries(unsigned stage, float factor, int lane) {
#pragma unroll
    for (int c = 0; c < D_STEPS; ++c) {
      const int row = lane % 16, chunk = smaller(2 * c + lane / 16, D_CHUNKS - 1);
      ldmatrix_x4(a[c], stage + row * K_PITCH + Row<HEAD_DIM>::chunk(row, chunk));
      if (factor != 1.f) {
#pragma unroll
        for (unsigned& pair : a[c]) pair = pack<Element>(factor * low<Element>(pair), factor * high<Element>(pair));
      }
    }
  }
};

// S = initial + Q K^T for the keys of COUNT blocks from block FIRST on.
template <int FIRST, int COUNT>
__device__ __forceinline__ void score(float (&s)[COUNT][4], const float (&initial)[COUNT][4], const Queries& query,
                                      unsigned keys, int slot, int lane) {
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    const unsigned row = keys + key_offset<SLOT_PLANE, SLOT_ROW>((FIRST + j) * 8, lane % 8) * K_PITCH;
#pragma unroll
    for (int c = 0; c < D_STEPS; c += 2) {
      unsigned key[4];
      ldmatrix_x4(key, row + Row<HEAD_DIM>::chunk(slot + lane % 8, smaller(2 * c + lane / 8, D_CHUNKS - 1)));
#pragma unroll
      for (int i = c; i < c + 2; ++i) {
        const unsigned(&a)[4] = query.a[i < D_STEPS ? i : 0];
        const float(&from)[4] = *(i == 0 ? &initial[j] : &s[j]);
        if (2 * i + 1 < D_CHUNKS) {
          Mma<Element>::m16n8k16(s[j], a[0], a[1], a[2], a[3], key[2 * (i - c)], key[2 * (i - c) + 1], from);
        } else if (2 * i < D_CHUNKS) {
          Mma<Element>::m16n8k8(s[j], a[0], a[1], key[2 * (i - c)], from);
        }
      }
    }
  }
}

// O += P V for the keys of COUNT blocks from block FIRST on. One more column of V, all ones, sums the weights as they
// are rounded for P V.
template <int FIRST, int COUNT>
__device__ __forceinline__ void weigh(Output& output, const float (&p)[COUNT][4], unsigned values, int slot, int lane) {
  const unsigned ones = pack<Element>(1.f, 1.f);
  float(&o)[V_TILES][4] = output.o;
#pragma unroll
  for (int j = 0; j < COUNT; j += 2) {
    const unsigned a0 = pack<Element>(p[j][0], p[j][1]), a1 = pack<Element>(p[j][2], p[j][3]);
    const int at = key_offset<SLOT_PLANE, SLOT_ROW>((FIRST + j) * 8, j + 1 < COUNT ? lane % 16 : lane % 8);
    const unsigned row = values + at * V_PITCH;
    if (j + 1 < COUNT) {
      const int i = j + 1 < COUNT ? j + 1 : j;
      const unsigned a2 = pack<Element>(p[i][0], p[i][1]), a3 = pack<Element>(p[i][2], p[i][3]);
#pragma unroll
      for (int n = 0; n < V_TILES; n += 2) {
        unsigned r[4];
        ldmatrix_x4_transposed(r, row + Row<HEAD_DIM_V>::chunk(slot + lane % 8, smaller(n + lane / 16, V_TILES - 1)));
        Mma<Element>::m16n8k16(o[n], a0, a1, a2, a3, r[0], r[1], o[n]);
        if (n + 1 < V_TILES) Mma<Element>::m16n8k16(o[n + 1], a0, a1, a2, a3, r[2], r[3], o[n + 1]);
      }
      Mma<Element>::m16n8k16(output.sum, a0, a1, a2, a3, ones, ones, output.sum);
    } else {
#pragma unroll
      for (int n = 0; n < V_TILES; n += 4) {
        unsigned r[4];
        ldmatrix_x4_transposed(r, row + Row<HEAD_DIM_V>::chunk(slot + lane % 8, smaller(n + lane / 8, V_TILES - 1)));
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (n + i < V_TILES) Mma<Element>::m16n8k8(o[n + i], a0, a1, r[i], o[n + i]);
      }
      Mma<Element>::m16n8k8(output.sum, a0, a1, ones, output.sum);
    }
  }
}

// The factors are of rows g and g + 8.
__device__ __forceinline__ void rescale(Output& output, const float (&factors)[2], int) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    output.sum[e] *= factors[e / 2];
#pragma unroll
    for (int n = 0; n < V_TILES; ++n) output.o[n][e] *= factors[e / 2];
  }
}

// What the lanes of a row know together.
__device__ __forceinline__ void complete(Output&) {}

using OutputShare = Share<HEAD_DIM_V>;

// O / sum to `base`, the tile's first: through the warp's stage, whose queries are then gone.
__device__ __forceinline__ void store_output(Element* base, unsigned char* stage, const Layout& s,
                                             const OutputShare& share, const Tile& tile, const Output& output,
                                             int lane) {
  __syncwarp();  // the queries have been read
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float inverse = rcp_approx(output.sum[2 * h]);
    unsigned char* row = stage + (lane / 4 + 8 * h) * V_PITCH + lane % 4 * 4;
#pragma unroll
    for (int n = 0; n < V_TILES; ++n)
      *reinterpret_cast<unsigned*>(row + Row<HEAD_DIM_V>::chunk(lane / 4, n)) =
          pack<Element>(output.o[n][2 * h] * inverse, output.o[n][2 * h + 1] * inverse);
  }
  __syncwarp();
  store_tile(base, stage, s, share, tile, lane);
}
