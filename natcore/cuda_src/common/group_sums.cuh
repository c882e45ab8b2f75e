// The end of a sum that the groups of a block have shared out: rows added through shared memory, in order.
#pragma once

#include "common/general.cuh"

// Adds the groups' rows in order, through shared memory, and writes the sum times factor.
template <int D>
__device__ __forceinline__ void sum_groups(Acc* shared, const Row<D>& row, Acc factor, Acc* result) {
  constexpr int size = Share<D>::size;
  __syncthreads();  // whatever lay there has been read
#pragma unroll
  for (int i = 0; i < size; ++i) shared[threadIdx.x * size + i] = row.x[i];
  __syncthreads();
  for (int slot = threadIdx.x; slot < LANES * size; slot += THREADS) {
    const int lane = slot / size, i = slot % size;
    const int element = (i / VECTOR * LANES + lane) * VECTOR + i % VECTOR;
    if (element >= D) continue;
    Acc total = 0;
    for (int g = 0; g < GROUPS; ++g) total += shared[g * LANES * size + slot];
    result[element] = total * factor;
  }
}
