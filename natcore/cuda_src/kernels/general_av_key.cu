// The sum over the queries that see a key of its place's number times the row of the query: general_av
// seen from the key.
//
// One group of LANES lanes owns one key of one kv head, holds its result and walks the queries that see
// it, for every query head of its kv head. On each axis they are one run (common/window.cuh):
//
//      # # # . .       query p has the key K at the place K - start(p) of its window, per axis
//      # K # . .
//      # # # . .       result = scale * sum over p of places[p][K - start(p)] * row[p]
//
// Backward of qk: d_scores, q -> dk. Backward of av: weights, d_out -> dv. Nobody else writes this
// result: no atomics, and the order of the sum is fixed.
#include "common/general.cuh"

struct Params {
  Sizes sizes;
  Layout places, rows, result;
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    general_av_key(const Element* __restrict__ places,  // [batch, x0, x1, x2, heads, places]
                   const Element* __restrict__ rows,    // [batch, x0, x1, x2, heads, HEAD_DIM]
                   Element* __restrict__ result,        // [batch, x0, x1, x2, heads_kv, HEAD_DIM]
                   const Acc scale, const __grid_constant__ Params params) {
  const Sizes& sizes = params.sizes;
  const Index item = static_cast<Index>(blockIdx.x) * GROUPS + threadIdx.x / LANES;
  if (item >= items(sizes, sizes.heads_kv)) return;
  const int lane = lane_in_group();
  const Place place = place_of(item, sizes, sizes.heads_kv);
  const int heads_per_kv = sizes.heads / sizes.heads_kv;
  const Spot s0(sizes.axis[0], place.x[0]), s1(sizes.axis[1], place.x[1]), s2(sizes.axis[2], place.x[2]);
  const Interval w0 = queries_of(sizes.axis[0], s0.inside, s0.length);
  const Interval w1 = queries_of(sizes.axis[1], s1.inside, s1.length);
  const Interval w2 = queries_of(sizes.axis[2], s2.inside, s2.length);

  Row<HEAD_DIM> sum;
  for (int head = place.head * heads_per_kv; head < (place.head + 1) * heads_per_kv; ++head) {
    for (int p0 = w0.start; p0 < w0.end; ++p0) {
      const int seen0 = s0.inside - keys_of(sizes.axis[0], p0, s0.length).start;
      for (int p1 = w1.start; p1 < w1.end; ++p1) {
        const int seen1 = s1.inside - keys_of(sizes.axis[1], p1, s1.length).start;
        const int x0 = s0.position(sizes.axis[0], p0), x1 = s1.position(sizes.axis[1], p1);
        const Element* numbers = places + offset_of(params.places, place.batch, x0, x1, 0, head);
        const Element* queries = rows + offset_of(params.rows, place.batch, x0, x1, 0, head);
        for (int p2 = w2.start; p2 < w2.end; ++p2) {
          const int seen2 = s2.inside - keys_of(sizes.axis[2], p2, s2.length).start;
          const int x2 = s2.position(sizes.axis[2], p2);
          RawRow<HEAD_DIM> query;
          query.load(queries + x2 * params.rows.axis[2], lane);
          sum.add(widen(numbers[x2 * params.places.axis[2] + place_in_window(sizes, seen0, seen1, seen2)]), query);
        }
      }
    }
  }
  sum.store(result + place.offset(params.result, place.head), lane, scale);
}
