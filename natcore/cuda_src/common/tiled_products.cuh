// The tiled backward's products, of 16-bit elements, and what comes and goes in their registers.
// (common/tiled_products_float32.cuh has the same for float32.)
#pragma once

#include "common/tiled_boxes.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "ptx/store.cuh"

// Own vectors as A operands.
template <int PADDED>
struct OwnRows {
  unsigned a[PADDED / 16][4];

  // From shared memory, multiplied by `factor`.
  __device__ __forceinline__ void read(unsigned source, float factor, int lane) {
#pragma unroll
    for (int step = 0; step < PADDED / 16; ++step) {
      const int chunk = Row<PADDED>::chunk(lane % 16, 2 * step + lane / 16);
      ldmatrix_x4(a[step], source + lane % 16 * Row<PADDED>::PITCH + chunk);
      if (factor != 1.f) {
#pragma unroll
        for (unsigned& pair : a[step])
          pair = pack<Element>(factor * low<Element>(pair), factor * high<Element>(pair));
      }
    }
  }
};

// C = start + own seen^T: two n8 sides, of a lane's seen token at `seen`, whose chunks lie as those of slot `token` do.
template <int PADDED>
__device__ __forceinline__ void multiply(float (&c)[2][4], const float (&first)[4], const float (&second)[4],
                                         const OwnRows<PADDED>& own, unsigned seen, unsigned token, unsigned lane) {
#pragma unroll
  for (int step = 0; step < PADDED / 16; ++step) {
    unsigned r[4];
    ldmatrix_x4(r, seen + Row<PADDED>::chunk(token % 8, 2 * step + lane / 8 % 2));
    const unsigned(&a)[4] = own.a[step];
    const float(&from)[2][4] = c;
    Mma<Element>::m16n8k16(c[0], a[0], a[1], a[2], a[3], r[0], r[1], step == 0 ? first : from[0]);
    Mma<Element>::m16n8k16(c[1], a[0], a[1], a[2], a[3], r[2], r[3], step == 0 ? second : from[1]);
  }
}

// The slot of a lane's seen token as a row of the transpose of B, from that of a step's first.
__device__ __forceinline__ unsigned transposed_token(int lane) { return lane % 8 + lane / 8 % 2 * SIDE_SLOTS; }

// C += weights seen, of the 16 seen tokens of a step.
template <int PADDED>
__device__ __forceinline__ void accumulate(float (&c)[PADDED / 8][4], const float (&weights)[2][4], unsigned seen,
                                           unsigned token, unsigned lane) {
  unsigned a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = pack<Element>(weights[i / 2][i % 2 * 2], weights[i / 2][i % 2 * 2 + 1]);
#pragma unroll
  for (int n = 0; n < PADDED / 8; n += 2) {
    unsigned r[4];
    ldmatrix_x4_transposed(r, seen + Row<PADDED>::chunk(token % 8, n + lane / 16));
    Mma<Element>::m16n8k16(c[n], a[0], a[1], a[2], a[3], r[0], r[1], c[n]);
    Mma<Element>::m16n8k16(c[n + 1], a[0], a[1], a[2], a[3], r[2], r[3], c[n + 1]);
  }
}

// The products of rows of dO in shared memory with those of O in registers, both of tokens g and g + 8: the diagonals
// of two products of matrices. All rows of dO are A, and eight of O are B.
__device__ __forceinline__ void multiply_rows(float (&products)[2], const unsigned char* gradients,
                                              const uint4 (&out)[2][OUT_CHUNKS], int lane) {
  float c[2][4] = {};
#pragma unroll
  for (int i = 0; i < OUT_CHUNKS; ++i) {
    const int chunk = smaller(4 * i + lane % 4, V / 8 - 1);  // beyond them O is zero
    uint4 a[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = lane / 4 + 8 * h;
      a[h] = *reinterpret_cast<const uint4*>(gradients + token * V_PITCH + Row<V>::chunk(token, chunk));
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint4& b = out[h][i];
      Mma<Element>::m16n8k16(c[h], a[0].x, a[1].x, a[0].y, a[1].y, b.x, b.y, c[h]);
      Mma<Element>::m16n8k16(c[h], a[0].z, a[1].z, a[0].w, a[1].w, b.z, b.w, c[h]);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float diagonal = lane / 4 % 2 == 0 ? c[h][2 * h] : c[h][2 * h + 1];  // where lane % 4 is half of lane / 4
    products[h] = __shfl_sync(~0u, diagonal, lane / 4 * 4 + lane / 8);
  }
}

// Four lanes have a row's 8 words of four n8 tiles, two elements each; afterwards lane t has all of tile t.
__device__ __forceinline__ void transpose_quad(unsigned (&r)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const unsigned received = __shfl_xor_sync(~0u, upper ? r[i] : r[i + bit], bit);
      (upper ? r[i] : r[i + bit]) = received;
    }
  }
}

// A result of a tile, times `factor`, to `base`, where its first token lies.
template <int COUNT, int PADDED>
__device__ __forceinline__ void store_result(Element* base, const Layout& s, const Tile& tile,
                                             const float (&result)[PADDED / 8][4], float factor, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int token = lane / 4 + 8 * h;
    const bool stored = tile.stores(token);
    Element* target = base + Tile::offset(s, token);
#pragma unroll
    for (int first = 0; first < PADDED / 8; first += 4) {
      unsigned r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = first + i < PADDED / 8 ? first + i : first;
        r[i] = pack<Element>(result[n][2 * h] * factor, result[n][2 * h + 1] * factor);
      }
      transpose_quad(r, lane);
      const int chunk = first + lane % 4;
      if (stored & (chunk < COUNT / 8)) store_16(target + chunk * 8, r);
    }
  }
}
