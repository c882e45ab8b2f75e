// drpb from the partial sums that blocks left: a sum over slices, in a fixed order, rounded once.
//
//   slices     0    1    2   ...   WARPS   ...        warp w adds slices w, w + WARPS, ..., a lane for
//   warps      w0   w1   w2  ...   w0      ...        each of 32 entries; then warp 0 adds the warps' sums
//
// Defines: RESULT (dtype of drpb), WARPS.
#include "common/types.cuh"
#include "ptx/grid.cuh"

struct Params {
  long long head, axis[3];  // strides of drpb, in elements
  int heads, shape[3], slices;
};

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    sum_drpb(const float* partials,      // [slices, heads, *shape], contiguous; the kernel before may still write them
             RESULT* __restrict__ drpb,  // [heads, *shape]
             const __grid_constant__ Params params) {
  __shared__ float of_warp[WARPS][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int entries = params.shape[0] * params.shape[1] * params.shape[2], count = params.heads * entries;
  const int at = blockIdx.x * 32 + lane;
  float sum = 0.f;
  wait_for_previous_grid();
  if (at < count) {
#pragma unroll 8
    for (int s = warp; s < params.slices; s += WARPS) sum += partials[static_cast<long long>(s) * count + at];
  }
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || at >= count) return;
  sum = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += of_warp[w][lane];
  const int entry = at % entries, row = entry / params.shape[2];
  drpb[at / entries * params.head + row / params.shape[1] * params.axis[0] + row % params.shape[1] * params.axis[1] +
       entry % params.shape[2] * params.axis[2]] = narrow<RESULT>(sum);
}
