// drpb, entry-stationary: each entry of the bias table gathers from the pairs that used it.
//
// One block owns a span of SPAN entries along the last axis of one head's table, at fixed offsets
// (r0, r1) on the other axes, and one slice of the queries, of all batch entries. The fixed offsets
// leave a query one row of keys, whose entries lie side by side:
//
//   window 5x5, r1 = 1                         key row of query p = p + r1 - (kernel - 1), in-group;
//      . k k k k k . .     entries r2 of       the query counts if its window has that row. Its keys
//      . . . . . . . .     Q's keys: 2..6      n2 use the entries n2 - p2 + kernel - 1. Near a border
//      . . . Q . . . .                         windows are clamped, and other entries are used.
//
// Each group of LANES lanes takes every GROUPS-th query and adds into a span of its own in shared
// memory; then the groups are added in order. general_sum_partials adds the slices. No atomics.
#include "common/dropout.cuh"
#include "common/general_backward.cuh"

struct Params {
  Sizes sizes;
  Layout d_out, q, k, v, lse, delta, rpb;
};

// The key on one axis, at an entry's offset from the query: where it lies, and its place from the start of
// the window. False where the query does not see it.
__device__ __forceinline__ bool key_at(const Axis& axis, int entry, int x, int& y, int& place) {
  const Spot spot(axis, x);
  const Interval keys = keys_of(axis, spot.inside, spot.length);
  const int n = spot.inside + entry - (axis.kernel - 1);
  y = spot.position(axis, n);
  place = n - keys.start;
  return n >= keys.start && n < keys.end;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    general_backward_bias(const Element* __restrict__ d_out,    // [batch, x0, x1, x2, heads, HEAD_DIM_V]
                          const Element* __restrict__ q,        // [batch, x0, x1, x2, heads, HEAD_DIM]
                          const Element* __restrict__ k,        // [batch, x0, x1, x2, heads_kv, HEAD_DIM]
                          const Element* __restrict__ v,        // [batch, x0, x1, x2, heads_kv, HEAD_DIM_V]
                          const Acc* __restrict__ lse,          // [batch, x0, x1, x2, heads]
                          const Acc* __restrict__ delta,        // [batch, x0, x1, x2, heads]
                          const BiasElement* __restrict__ rpb,  // [heads, 2 k0 - 1, 2 k1 - 1, 2 k2 - 1]
                          const unsigned* __restrict__ dropout_seed,  // [1], or null
                          Acc* __restrict__ partials,           // [slices, heads, 2 k0 - 1, 2 k1 - 1, 2 k2 - 1]
                          const Acc scale, const __grid_constant__ Params params) {
  const Sizes& sizes = params.sizes;
  const int entries0 = 2 * sizes.axis[0].kernel - 1, entries1 = 2 * sizes.axis[1].kernel - 1;
  const int entries2 = 2 * sizes.axis[2].kernel - 1, spans = (entries2 + SPAN - 1) / SPAN;
  const unsigned row = blockIdx.x / spans;  // of [slices, heads, entries0, entries1]
  const int first_entry = blockIdx.x % spans * SPAN;
  const int r1 = row % entries1, r0 = row / entries1 % entries0;
  const int head = row / entries1 / entries0 % sizes.heads, slice = row / entries1 / entries0 / sizes.heads;
  const int head_kv = head / (sizes.heads / sizes.heads_kv);
  const int lane = lane_in_group(), group = threadIdx.x / LANES;
  const Acc scale2 = scale * LOG2_E;
  const BiasElement* table =
      rpb + head * params.rpb.head + r0 * params.rpb.axis[0] + r1 * params.rpb.axis[1];

  __shared__ Acc sums[GROUPS][SPAN];
  for (int e = lane; e < SPAN; e += LANES) sums[group][e] = 0;
  __syncthreads();

  const Index queries = items(sizes, 1), part = (queries + sizes.slices - 1) / sizes.slices;
  const Index first = slice * part, end = queries - first < part ? queries : first + part;
  const Place step = place_of(GROUPS, sizes, 1);
  Place from = place_of(first + group, sizes, 1);
  for (Index query = first + group; query < end && first < queries; query += GROUPS, advance(from, step, sizes, 1)) {
    int y0, y1, place0, place1;
    if (!key_at(sizes.axis[1], r1, from.x[1], y1, place1) || !key_at(sizes.axis[0], r0, from.x[0], y0, place0)) continue;
    // The keys of the row whose entries, e2 = n2 + shift, lie in the span.
    const Spot spot(sizes.axis[2], from.x[2]);
    const Interval window = keys_of(sizes.axis[2], spot.inside, spot.length);
    const int shift = sizes.axis[2].kernel - 1 - spot.inside;
    const int start = larger(window.start, first_entry - shift), stop = smaller(window.end, first_entry + SPAN - shift);
    if (start >= stop) continue;

    Row<HEAD_DIM> q_row;
    Row<HEAD_DIM_V> gradient;
    q_row.load(q + from.offset(params.q, head), lane);
    gradient.load(d_out + from.offset(params.d_out, head), lane);
    const QueryScalars scalars{LOG2_E * lse[from.offset(params.lse, head)], delta[from.offset(params.delta, head)]};
    const Element* keys = k + offset_of(params.k, from.batch, y0, y1, 0, head_kv);
    const Element* values = v + offset_of(params.v, from.batch, y0, y1, 0, head_kv);
    const Dropout dropout(sizes, dropout_seed, static_cast<unsigned long long>(query) * sizes.heads + head);
    for (int n2 = start; n2 < stop; ++n2) {
      const int y2 = spot.position(sizes.axis[2], n2);
      RawRow<HEAD_DIM> key;
      RawRow<HEAD_DIM_V> value;
      key.load(keys + y2 * params.k.axis[2], lane);
      value.load(values + y2 * params.v.axis[2], lane);
      const Acc factor = dropout.factor(place_in_window(sizes, place0, place1, n2 - window.start));
      const Acc qk = group_sum(q_row.dot(key)), dp = factor * group_sum(gradient.dot(value));
      const Acc bias2 = LOG2_E * widen(table[(n2 + shift) * params.rpb.axis[2]]);
      const PairGradient pair(qk, dp, scale2, bias2, scalars);
      if (lane == 0) sums[group][n2 + shift - first_entry] += pair.ds;
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < SPAN && first_entry + e < entries2; e += THREADS) {
    Acc total = 0;
    for (int g = 0; g < GROUPS; ++g) total += sums[g][e];
    partials[static_cast<long long>(row) * entries2 + first_entry + e] = total;
  }
}
