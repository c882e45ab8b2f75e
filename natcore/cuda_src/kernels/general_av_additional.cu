// The sum over all queries of an additional key's place times the row of the query.
//
// One block owns one additional key of one kv head and one slice of the queries of its batch entry; each
// group of LANES lanes takes every GROUPS-th of them:
//
//   queries of the slice   0 1 2 3 4 5 6 7 8 9 ...     (token-major, the kv head's query heads fastest)
//   group                  0 1 2 3 0 1 2 3 0 1 ...     each adds up its own; the groups are added in order
//
// general_sum_partials adds the slices. No atomics. Backward of qk: d_scores, q -> d_additional_keys.
// Backward of av: weights, d_out -> d_additional_values.
#include "common/group_sums.cuh"

struct Params {
  Sizes sizes;
  Layout places, rows;
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    general_av_additional(const Element* __restrict__ places,  // [batch, x0, x1, x2, heads, places]
                          const Element* __restrict__ rows,    // [batch, x0, x1, x2, heads, HEAD_DIM]
                          Acc* __restrict__ partials,          // [slices, batch, extra, heads_kv, HEAD_DIM]
                          const Acc scale, const __grid_constant__ Params params) {
  const Sizes& sizes = params.sizes;
  unsigned rest = blockIdx.x;
  const int head_kv = rest % sizes.heads_kv;
  rest /= sizes.heads_kv;
  const int e = rest % sizes.extra;
  rest /= sizes.extra;
  const int batch = rest % sizes.batch, slice = rest / sizes.batch;
  const int heads_per_kv = sizes.heads / sizes.heads_kv;
  const int lane = lane_in_group(), number = sizes.places - sizes.extra + e;

  const Index queries = items(sizes, heads_per_kv) / sizes.batch, part = (queries + sizes.slices - 1) / sizes.slices;
  const Index first = slice * part, end = queries - first < part ? queries : first + part;
  const Place step = place_of(GROUPS, sizes, heads_per_kv);
  Index query = first + threadIdx.x / LANES;
  Place place = place_of(query, sizes, heads_per_kv);  // of a batch of one
  place.batch = batch;
  Row<HEAD_DIM> sum;
  for (; query < end && first < queries; query += GROUPS, advance(place, step, sizes, heads_per_kv)) {
    const int head = head_kv * heads_per_kv + place.head;
    RawRow<HEAD_DIM> row;
    row.load(rows + place.offset(params.rows, head), lane);
    sum.add(widen(places[place.offset(params.places, head) + number]), row);
  }
  __shared__ Acc shared[THREADS * Share<HEAD_DIM>::size];
  sum_groups(shared, sum, scale, partials + static_cast<long long>(blockIdx.x) * HEAD_DIM);
}
