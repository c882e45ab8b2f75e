// delta = d_out . out - d_lse of every query, which the backward kernels subtract from d_out . v.
//
//   d_out row   # # # # # # # #    LANES lanes own a row and multiply chunk by chunk;
//   out row     # # # # # # # #    a few shuffles end the sum; one lane writes it
#include "common/general.cuh"

struct Params {
  Sizes sizes;
  Layout d_out, out, d_lse, delta;
};

extern "C" __global__ void __launch_bounds__(THREADS)
    general_delta(const Element* __restrict__ d_out,  // [batch, x0, x1, x2, heads, HEAD_DIM_V]
                  const Element* __restrict__ out,    // [batch, x0, x1, x2, heads, HEAD_DIM_V]
                  const Acc* __restrict__ d_lse,      // [batch, x0, x1, x2, heads], or null: zeros
                  Acc* __restrict__ delta,            // [batch, x0, x1, x2, heads]
                  const __grid_constant__ Params params) {
  const Sizes& sizes = params.sizes;
  const Index item = static_cast<Index>(blockIdx.x) * GROUPS + threadIdx.x / LANES;
  if (item >= items(sizes, sizes.heads)) return;
  const int lane = lane_in_group();
  const Place place = place_of(item, sizes, sizes.heads);

  Row<HEAD_DIM_V> gradient, value;
  gradient.load(d_out + place.offset(params.d_out, place.head), lane);
  value.load(out + place.offset(params.out, place.head), lane);
  Acc sum = group_sum(gradient.dot(value));
  if (d_lse != nullptr) sum -= d_lse[place.offset(params.d_lse, place.head)];
  if (lane == 0) delta[place.offset(params.delta, place.head)] = sum;
}
