// The products of each query with the keys it sees: one place of memory for each.
//
// One group of LANES lanes owns one query of one head and walks its window. The places of a window are
// its keys in row-major order, from where the window starts, and then the additional keys:
//
//      . # # # # . .       a causal query sees part of its window only; the other places are `empty`:
//      . # # Q . . .       -infinity for scores, 0 for the gradient of weights
//      . . . . . . .       places   # # # # # # e e e e e e
//
// Forward of qk: q, k, bias -> scores. Backward of av: d_out, v -> d_weights.
#include "common/general.cuh"

struct Params {
  Sizes sizes;
  Layout q, k, rpb, additional_keys, places;
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    general_qk(const Element* __restrict__ q,                // [batch, x0, x1, x2, heads, HEAD_DIM]
               const Element* __restrict__ k,                // [batch, x0, x1, x2, heads_kv, HEAD_DIM]
               const BiasElement* __restrict__ rpb,          // [heads, 2 k0 - 1, 2 k1 - 1, 2 k2 - 1]
               const Element* __restrict__ additional_keys,  // [batch, extra, heads_kv, HEAD_DIM]
               Element* __restrict__ places,                 // [batch, x0, x1, x2, heads, places]
               const Acc scale, const Acc empty, const __grid_constant__ Params params) {
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

  Row<HEAD_DIM> query;
  query.load(q + place.offset(params.q, place.head), lane);
  Element* result = places + place.offset(params.places, place.head);
  for (int n0 = w0.start; n0 < w0.start + sizes.axis[0].kernel; ++n0) {
    for (int n1 = w1.start; n1 < w1.start + sizes.axis[1].kernel; ++n1) {
      const bool row_seen = n0 < w0.end && n1 < w1.end;
      const int y0 = s0.position(sizes.axis[0], n0), y1 = s1.position(sizes.axis[1], n1);
      const Element* keys = k + offset_of(params.k, place.batch, y0, y1, 0, head_kv);
#ifdef RPB
      const BiasElement* table = rpb + place.head * params.rpb.head +
                                 bias_entry(sizes, params.rpb, 0, n0, s0.inside) +
                                 bias_entry(sizes, params.rpb, 1, n1, s1.inside);
#endif
      for (int n2 = w2.start; n2 < w2.start + sizes.axis[2].kernel; ++n2, ++result) {
        Acc product = empty;
        if (row_seen && n2 < w2.end) {
          RawRow<HEAD_DIM> key;
          key.load(keys + s2.position(sizes.axis[2], n2) * params.k.axis[2], lane);
          product = scale * group_sum(query.dot(key));
#ifdef RPB
          product += widen(table[bias_entry(sizes, params.rpb, 2, n2, s2.inside)]);
#endif
        }
        if (lane == 0) *result = narrow<Element>(product);
      }
    }
  }
  const Element* keys = additional_keys + offset_of(params.additional_keys, place.batch, 0, 0, 0, head_kv);
  for (int e = 0; e < sizes.extra; ++e, ++result) {
    RawRow<HEAD_DIM> key;
    key.load(keys + e * params.additional_keys.axis[2], lane);
    const Acc product = scale * group_sum(query.dot(key));
    if (lane == 0) *result = narrow<Element>(product);
  }
}
