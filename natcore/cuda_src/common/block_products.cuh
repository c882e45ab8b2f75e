// Products of blocks of 16 tokens with 8 others, vectors of STEPS times 16 elements, on tensor cores.
#pragma once

#include "common/types.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"

// A block's vectors as A operands: `at` is where this lane's token of some block lies, for each step, and the block's
// own lies `offset` bytes after it.
template <int STEPS>
__device__ __forceinline__ void load_block(unsigned (&a)[STEPS][4], const unsigned (&at)[STEPS], int offset) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) ldmatrix_x4(a[step], at[step] + offset);
}
template <int STEPS>
__device__ __forceinline__ void load_transposed(unsigned (&a)[STEPS][4], const unsigned (&at)[STEPS], int offset) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) ldmatrix_x4_transposed(a[step], at[step] + offset);
}

// D = C + block others^T, 16 x 8: a sum over the steps of their vectors. D may be C.
template <typename T, int STEPS>
__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&block)[STEPS][4],
                                         const unsigned (&others)[2 * STEPS], const float (&c)[4]) {
  const float(&sum)[4] = d;
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
    Mma<T>::m16n8k16(d, block[step][0], block[step][1], block[step][2], block[step][3], others[2 * step],
                           others[2 * step + 1], step == 0 ? c : sum);
}

// C += block^T b, elements of vectors x 8 others: a tile of C for each step.
template <typename T, int STEPS>
__device__ __forceinline__ void multiply_transposed(float (&c)[STEPS][4], const unsigned (&transposed)[STEPS][4],
                                                    const unsigned (&b)[2]) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
    Mma<T>::m16n8k16(c[step], transposed[step][0], transposed[step][1], transposed[step][2],
                           transposed[step][3], b[0], b[1], c[step]);
}
