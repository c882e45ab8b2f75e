// The sum over each query's places of their numbers times the rows of their keys.
//
// One group of LANES lanes owns one query of one head, holds its result and walks its window:
//
//      . . # # # . .       result = scale * (sum over the window of place * row
//      . . # Q # . .                         + sum over additional keys of place * row)
//      . . # # # . .
//
// Forward of av: weights, v -> out. Backward of qk: d_scores, k -> dq.
#include "common/general.cuh"

struct Params {
  Sizes sizes;
  Layout places, v, additional_values, out;
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    general_av(const Element* __restrict__ places,             // [batch, x0, x1, x2, heads, places]
               const Element* __restrict__ v,                  // [batch, x0, x1, x2, heads_kv, HEAD_DIM_V]
               const Element* __restrict__ additional_values,  // [batch, extra, heads_kv, HEAD_DIM_V]
               Element* __restrict__ out,                      // [batch, x0, x1, x2, heads, HEAD_DIM_V]
               const Acc scale, const __grid_constant__ Params params) {
  const Sizes& sizes = params.sizes;
  const Index item = static_cast<Index>(blockIdx.x) * GROUPS + threadIdx.x / LANES;
  if (item >= items(sizes, sizes.heads)) return;
  const int lane = lane_in_group();
  const Place place = place_of(item, sizes, sizes.heads);
  const int head_kv = place.head / (sizes.heads / sizes.heads_kv);
  const Spot s0(sizes.axis[0], place.x[0]), s1(sizes.axis[1], place.x[1]), s2(sizes.axis[2], place.x[2]);
  const Interval w0 = keys_of(sizes.axis[0], s0.inside, s0.length);
  const Interval w1 = keys_of(sizes.axis[1], s1.inside, s1.length);
  const Interval w2 = keys_of(sizes.axis[2], s2.inside, s2.length);

  Row<HEAD_DIM_V> sum;
  const Element* weights = places + place.offset(params.places, place.head);
  for (int n0 = w0.start; n0 < w0.end; ++n0) {
    for (int n1 = w1.start; n1 < w1.end; ++n1) {
      const int y0 = s0.position(sizes.axis[0], n0), y1 = s1.position(sizes.axis[1], n1);
      const Element* values = v + offset_of(params.v, place.batch, y0, y1, 0, head_kv);
      const Element* row = weights + place_in_window(sizes, n0 - w0.start, n1 - w1.start, 0);
      for (int n2 = w2.start; n2 < w2.end; ++n2) {
        RawRow<HEAD_DIM_V> value;
        value.load(values + s2.position(sizes.axis[2], n2) * params.v.axis[2], lane);
        sum.add(widen(row[n2 - w2.start]), value);
      }
    }
  }
  const Element* values = additional_values + offset_of(params.additional_values, place.batch, 0, 0, 0, head_kv);
  for (int e = 0; e < sizes.extra; ++e) {
    RawRow<HEAD_DIM_V> value;
    value.load(values + e * params.additional_values.axis[2], lane);
    sum.add(widen(weights[sizes.places - sizes.extra + e]), value);
  }
  sum.store(out + place.offset(params.out, place.head), lane, scale);
}
