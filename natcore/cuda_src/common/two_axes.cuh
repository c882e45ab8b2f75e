// Two-dimensional maps: how an operand lies in memory, written by layout_of_two_axes of natcore/planning/operands.py,
// and the window. Defines, for a = 0, 1: KERNEL_a, STRIDE_a, CAUSAL_a.
#pragma once

#include "common/window.cuh"

struct Layout {  // strides in elements; `step` is that of neighbours in a dilation group
  long long batch;
  int head, axis[2], step[2];

  __device__ __forceinline__ int of(int row, int column) const { return row * step[0] + column * step[1]; }
};

__device__ __forceinline__ Axis window_of(int a) {
  return {0, a == 0 ? KERNEL_0 : KERNEL_1, a == 0 ? STRIDE_0 : STRIDE_1, 1, a == 0 ? CAUSAL_0 : CAUSAL_1};
}
