// The tiled backward's products, of float32 elements (see common/split.cuh), and what comes and goes in registers.
// (common/tiled_products.cuh has the same for 16-bit elements.)
#pragma once

#include "common/split.cuh"
#include "common/tiled_boxes.cuh"
#include "ptx/ldmatrix.cuh"

// Own vectors as A operands: both parts in registers or, where they are too many, as they are in shared memory.
template <int PADDED>
struct OwnRows {
  Split<4> a[OWN_STAGES == 1 ? PADDED / 8 : 1];
  unsigned at;
  float factor;

  // From shared memory, multiplied by `factor`.
  __device__ __forceinline__ void read(unsigned source, float its_factor, int lane) {
    at = source + lane % 16 * Row<PADDED>::PITCH, factor = its_factor;
#pragma unroll
    for (int step = 0; step < PADDED / 8 && OWN_STAGES == 1; ++step) a[step] = load(step, lane);
  }
  __device__ __forceinline__ Split<4> load(int step, int lane) const {
    unsigned r[4];
    ldmatrix_x4(r, at + Row<PADDED>::chunk(lane % 16, 2 * step + lane / 16));
    if (factor != 1.f) {
#pragma unroll
      for (unsigned& element : r) element = __float_as_uint(factor * __uint_as_float(element));
    }
    return Split<4>(r, true);
  }
};

constexpr bool LONG_SUMS = D > 64 || V > 64;  // whose smaller products are worth registers of their own

// C = start + own seen^T: two n8 sides, of a lane's seen token at `seen`, whose chunks lie as those of slot `token` do.
template <int PADDED>
__device__ __forceinline__ void multiply(float (&c)[2][4], const float (&first)[4], const float (&second)[4],
                                         const OwnRows<PADDED>& own, unsigned seen, unsigned token, unsigned lane) {
  constexpr int AT_ONCE = OWN_STAGES == 1 ? PADDED / 8 : 2;  // steps whose operands are in registers
  float small[2][4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) c[0][i] = first[i], c[1][i] = second[i];
#pragma unroll AT_ONCE
  for (int step = 0; step < PADDED / 8; ++step) {
    unsigned r[4];
    ldmatrix_x4(r, seen + Row<PADDED>::chunk(token % 8, 2 * step + lane / 8 % 2));
    const Split<4> a = OWN_STAGES == 1 ? own.a[OWN_STAGES == 1 ? step : 0] : own.load(step, lane);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const Split<2> b(r + 2 * side);
      if (LONG_SUMS) {
        multiply_small(small[side], a, b, small[side]);
        multiply_high(c[side], a, b, c[side]);
      } else {
        multiply(c[side], a, b, c[side]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8 && LONG_SUMS; ++i) c[i / 4][i % 4] += small[i / 4][i % 4];
}

// The slot of the first of a lane's two seen tokens of the first side, from that of a step's first.
__device__ __forceinline__ unsigned transposed_token(int lane) { return lane % 4 * 2; }

// C^T += seen^T weights^T, of the 16 seen tokens of a step: tiles 2 m and 2 m + 1 are of elements 16 m to 16 m + 15.
template <int PADDED>
__device__ __forceinline__ void accumulate(float (&c)[PADDED / 8][4], const float (&weights)[2][4], unsigned seen,
                                           unsigned token, unsigned lane) {
  const Split<2> its[2][2] = {{transposed(weights[0], 0), transposed(weights[0], 1)},
                              {transposed(weights[1], 0), transposed(weights[1], 1)}};
  seen += lane / 4 % 2 * 8;
#pragma unroll
  for (int n = 0; n < PADDED / 8; n += 2) {
    float sum[2][4] = {};  // of a step: long sums are rounded to nearest
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int chunk = 2 * n + lane / 8;
      const unsigned at = seen + side * (SIDE_SLOTS * Row<PADDED>::PITCH);
      const Split<4> a = load_transposed(at + Row<PADDED>::chunk(token % 8, chunk),
                                         at + Row<PADDED>::PITCH + Row<PADDED>::chunk((token + 1) % 8, chunk));
#pragma unroll
      for (int h = 0; h < 2; ++h) multiply(sum[h], a, its[side][h], sum[h]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) c[n + i / 4][i % 4] += sum[i / 4][i % 4];
  }
}

// The products of rows of dO in shared memory with those of O in registers, both of tokens g and g + 8.
__device__ __forceinline__ void multiply_rows(float (&products)[2], const unsigned char* gradients,
                                              const uint4 (&out)[2][OUT_CHUNKS], int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int token = lane / 4 + 8 * h;
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < OUT_CHUNKS; ++i) {
      const int at = token * V_PITCH + Row<V>::chunk(token, 4 * i + lane % 4);
      const float4 a = *reinterpret_cast<const float4*>(gradients + at);
      const uint4& b = out[h][i];
      sum = __fmaf_rn(a.x, __uint_as_float(b.x), __fmaf_rn(a.y, __uint_as_float(b.y), sum));
      sum = __fmaf_rn(a.z, __uint_as_float(b.z), __fmaf_rn(a.w, __uint_as_float(b.w), sum));
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    products[h] = sum + __shfl_xor_sync(~0u, sum, 2);
  }
}

// A result of a tile, times `factor`, to `base`, where its first token lies.
template <int COUNT, int PADDED>
__device__ __forceinline__ void store_result(Element* base, const Layout& s, const Tile& tile,
                                             const float (&result)[PADDED / 8][4], float factor, int lane) {
  const int element = lane / 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = lane % 4 * 2 + i % 2 + i / 2 * 8;
    if (!tile.stores(token)) continue;
    float* target = base + Tile::offset(s, token) + element;
#pragma unroll
    for (int n = 0; n < PADDED / 8; n += 2) {
      const float(&c)[4] = result[n + i / 2];
      if (8 * n + 16 <= COUNT || element < COUNT - 8 * n)
        *reinterpret_cast<float2*>(target + 8 * n) = float2{c[i % 2] * factor, c[i % 2 + 2] * factor};
    }
  }
}
