// drpb of unfused scores, entry-stationary: each entry of the bias table gathers the d_scores of its pairs.
//
// As general_backward_bias: one block owns a span of SPAN entries along the last axis of one head's table,
// at fixed offsets (r0, r1) on the other axes, and one slice of the queries, of all batch entries. The
// fixed offsets leave a query one row of places, whose entries lie side by side:
//
//   window 5x5, r1 = 1                         row of places at p = p + r1 - (kernel - 1), in-group;
//      . k k k k k . .     entries r2 of       the query counts if its window has that row
//      . . . . . . . .     Q's row: 2..6
//      . . . Q . . . .
//
// Each group of LANES lanes takes every GROUPS-th query, and each of its lanes every
// LANES-th entry; they add into a span of the group's own in shared memory. Then the groups are added in
// order, and the slices by general_sum_partials. No atomics.
#include "common/general.cuh"

struct Params {
  Sizes sizes;
  Layout d_scores;
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    general_qk_bias(const Element* __restrict__ d_scores,  // [batch, x0, x1, x2, heads, places]
                    Acc* __restrict__ partials,            // [slices, heads, 2 k0 - 1, 2 k1 - 1, 2 k2 - 1]
                    const __grid_constant__ Params params) {
  const Sizes& sizes = params.sizes;
  const int entries0 = 2 * sizes.axis[0].kernel - 1, entries1 = 2 * sizes.axis[1].kernel - 1;
  const int entries2 = 2 * sizes.axis[2].kernel - 1, spans = (entries2 + SPAN - 1) / SPAN;
  const unsigned row = blockIdx.x / spans;  // of [slices, heads, entries0, entries1]
  const int first_entry = blockIdx.x % spans * SPAN;
  const int r1 = row % entries1, r0 = row / entries1 % entries0;
  const int head = row / entries1 / entries0 % sizes.heads, slice = row / entries1 / entries0 / sizes.heads;
  const int group = threadIdx.x / LANES, lane = lane_in_group();

  __shared__ Acc sums[GROUPS][SPAN];
  for (int e = lane; e < SPAN; e += LANES) sums[group][e] = 0;
  __syncthreads();

  const Index queries = items(sizes, 1), part = (queries + sizes.slices - 1) / sizes.slices;
  const Index first = slice * part, end = queries - first < part ? queries : first + part;
  const Place step = place_of(GROUPS, sizes, 1);
  Place from = place_of(first + group, sizes, 1);
  for (Index query = first + group; query < end && first < queries; query += GROUPS, advance(from, step, sizes, 1)) {
    const Spot s0(sizes.axis[0], from.x[0]), s1(sizes.axis[1], from.x[1]), s2(sizes.axis[2], from.x[2]);
    const Interval w0 = keys_of(sizes.axis[0], s0.inside, s0.length);
    const Interval w1 = keys_of(sizes.axis[1], s1.inside, s1.length);
    const Interval w2 = keys_of(sizes.axis[2], s2.inside, s2.length);
    const int n0 = s0.inside + r0 - (sizes.axis[0].kernel - 1), n1 = s1.inside + r1 - (sizes.axis[1].kernel - 1);
    if (n0 < w0.start || n0 >= w0.end || n1 < w1.start || n1 >= w1.end) continue;
    // The keys of the row whose entries, n2 + shift, lie in the span.
    const int shift = sizes.axis[2].kernel - 1 - s2.inside;
    const int start = larger(w2.start, first_entry - shift), stop = smaller(w2.end, first_entry + SPAN - shift);
    const Element* places = d_scores + from.offset(params.d_scores, head) +
                            place_in_window(sizes, n0 - w0.start, n1 - w1.start, 0);
    const int own = (lane - (start + shift - first_entry)) & (LANES - 1);  // an entry belongs to one lane
    for (int n2 = start + own; n2 < stop; n2 += LANES)
      sums[group][n2 + shift - first_entry] += widen(places[n2 - w2.start]);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < SPAN && first_entry + e < entries2; e += THREADS) {
    Acc total = 0;
    for (int g = 0; g < GROUPS; ++g) total += sums[g][e];
    partials[static_cast<long long>(row) * entries2 + first_entry + e] = total;
  }
}
