// The second pass of every gathered sum: result = sum over slices of partials, in the order of the
// slices, rounded once. Of no slices at all the sum is zero.
//
//   partials   slice 0  | a0 b0 c0 ... |
//              slice 1  | a1 b1 c1 ... |       one thread a column: loads of a warp lie side by side
//              ...
//   result              | a  b  c  ... |       strided, in its own dtype
//
// Defines: PARTIAL (dtype of the partials), RESULT (dtype of the result), THREADS.
#include "common/types.cuh"

struct Params {
  long long stride[4];  // of the result, in elements
  int shape[4];
  int slices;
};

extern "C" __global__ void __launch_bounds__(THREADS)
    general_sum_partials(const PARTIAL* __restrict__ partials,  // [slices, *shape], contiguous
                         RESULT* __restrict__ result,           // [*shape]
                         const __grid_constant__ Params params) {
  long long count = 1;
#pragma unroll
  for (int a = 0; a < 4; ++a) count *= params.shape[a];
  const long long column = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
  if (column >= count) return;

  PARTIAL sum = 0;
#pragma unroll 8
  for (int s = 0; s < params.slices; ++s) sum += partials[s * count + column];

  long long rest = column, offset = 0;
#pragma unroll
  for (int a = 3; a >= 0; --a) {
    offset += rest % params.shape[a] * params.stride[a];
    rest /= params.shape[a];
  }
  result[offset] = narrow<RESULT>(sum);
}
