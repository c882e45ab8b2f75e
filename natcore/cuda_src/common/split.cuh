// Products of float32 matrices on tensor cores, nearly as exact as float32 arithmetic.
//
// A tensor core takes the 11 leading bits of a float32 (TF32). So a = high + low: `high` is a as it is, whose other
// bits the tensor core ignores, and `low`, exactly a minus those 11 bits, has the next 11. Then
//
//   a b = low_a high_b + high_a low_b + high_a high_b
//
// up to 2^-20 of |a b|: the product of both low parts, and the bits beyond them (three products: Markidis et al., 2018;
// Ootomo and Yokota, 2022). Where one of the factors is split once for many products, its `high` is rounded to nearest,
// so that products of low parts have either sign; benchmarks/results/float32.md has what is left.
#pragma once

#include "ptx/load.cuh"
#include "ptx/mma.cuh"

// Both parts of an operand as mma_tf32_m16n8k8 takes it: of COUNT = 4 registers A, of 2 B.
template <int COUNT>
struct Split {
  unsigned high[COUNT], low[COUNT];

  Split() = default;
  __device__ __forceinline__ explicit Split(const unsigned* values, bool rounded = false) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      high[i] = rounded ? values[i] + 0x1000u : values[i];
      low[i] = __float_as_uint(__uint_as_float(values[i]) - __uint_as_float(high[i] & 0xffffe000u));
    }
  }
};

// The smaller products of A B, plus C; and the largest one. A tensor core rounds sums towards zero: where the two are
// summed apart and added up at the end, two thirds of these roundings are of small sums.
__device__ __forceinline__ void multiply_small(float (&small)[4], const Split<4>& a, const Split<2>& b,
                                               const float (&c)[4]) {
  mma_tf32_m16n8k8(small, a.low, b.high[0], b.high[1], c);
  mma_tf32_m16n8k8(small, a.high, b.low[0], b.low[1], small);
}
__device__ __forceinline__ void multiply_high(float (&d)[4], const Split<4>& a, const Split<2>& b,
                                              const float (&c)[4]) {
  mma_tf32_m16n8k8(d, a.high, b.high[0], b.high[1], c);
}

// D = A B + C.
__device__ __forceinline__ void multiply(float (&d)[4], const Split<4>& a, const Split<2>& b, const float (&c)[4]) {
  multiply_small(d, a, b, c);
  multiply_high(d, a, b, d);
}

// ---- sums over tokens: R = W T, of 16 rows, 8 tokens and 16 elements at a time, as R^T = T^T W^T ----
//
// Of a C tile with its tokens in columns 2 t and 2 t + 1, a lane's two registers of a row are B of W^T as they are: the
// tokens have the numbers t and t + 4 then. A is T^T, whose rows g and g + 8 are elements 2 g and 2 g + 1: so a lane
// reads two elements of each of its two tokens. Of R^T it holds these two elements for rows 2 t and 2 t + 1 of R, in
// one tile for rows 0 to 7 and in another one for the others.

// T^T of a lane's two tokens, from where the first of its two elements lies in the row of each.
__device__ __forceinline__ Split<4> load_transposed(unsigned first, unsigned second) {
  unsigned r[4];
  load_shared_8(r[0], r[1], first);
  load_shared_8(r[2], r[3], second);
  return Split<4>(r);
}

// W^T of rows 0 to 7 (h = 0) or 8 to 15.
__device__ __forceinline__ Split<2> transposed(const float (&w)[4], int h) {
  const unsigned r[2] = {__float_as_uint(w[2 * h]), __float_as_uint(w[2 * h + 1])};
  return Split<2>(r);
}

// What lanes 4 g hold of row g, for row 2 t + e.
__device__ __forceinline__ float of_column(float of_row, int e, int lane) {
  return __shfl_sync(~0u, of_row, (lane % 4 * 2 + e) * 4);
}
