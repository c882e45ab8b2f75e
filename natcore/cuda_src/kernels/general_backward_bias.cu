// drpb, entry-stationary: each entry of the bias table gathers from the pairs that used it.
//
// One block owns one entry of one head's table and one slice of the queries, of all batch entries.
// An entry is an offset from query to key, so a query has at most one pair for it:
//
//   entry (r0, r1), window 5x5        key = query + r - (kernel - 1), in-group, on each axis;
//      . . . . . . . .                the query counts if that key is in its window. Near a border
//      . Q . . Q . . .                windows are clamped, which is where the outer entries,
//      . . \ . . \ . .                beyond half a kernel, are used.
//      . . . K . . K .
//
// The block adds its ds in a fixed order; general_sum_partials adds the slices. No atomics.
#include "common/general_backward.cuh"

struct Params {
  Sizes sizes;
  Layout d_out, q, k, v, lse, delta, rpb;
};

// The key that lies at this entry's offset from the query. False where it is not in the query's window.
__device__ __forceinline__ bool key_at(const Sizes& sizes, const int (&entry)[3], const Place& from, Place& to) {
#pragma unroll
  for (int a = 2; a >= 0; --a) {
    const Axis& axis = sizes.axis[a];
    const Spot spot(axis, from.x[a]);
    const Interval keys = keys_of(axis, spot.inside, spot.length);
    const int n = spot.inside + entry[a] - (axis.kernel - 1);
    if (n < keys.start || n >= keys.end) return false;
    to.x[a] = spot.position(axis, n);
  }
  to.batch = from.batch;
  return true;
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    general_backward_bias(const Element* __restrict__ d_out,    // [batch, x0, x1, x2, heads, HEAD_DIM_V]
                          const Element* __restrict__ q,        // [batch, x0, x1, x2, heads, HEAD_DIM]
                          const Element* __restrict__ k,        // [batch, x0, x1, x2, heads_kv, HEAD_DIM]
                          const Element* __restrict__ v,        // [batch, x0, x1, x2, heads_kv, HEAD_DIM_V]
                          const Acc* __restrict__ lse,          // [batch, x0, x1, x2, heads]
                          const Acc* __restrict__ delta,        // [batch, x0, x1, x2, heads]
                          const BiasElement* __restrict__ rpb,  // [heads, 2 k0 - 1, 2 k1 - 1, 2 k2 - 1]
                          Acc* __restrict__ partials,           // [slices, heads, 2 k0 - 1, 2 k1 - 1, 2 k2 - 1]
                          const Acc scale, const __grid_constant__ Params params) {
  const Sizes& sizes = params.sizes;
  int entry[3];
  unsigned rest = blockIdx.x;
#pragma unroll
  for (int a = 2; a >= 0; --a) {
    const int entries = 2 * sizes.axis[a].kernel - 1;
    entry[a] = rest % entries;
    rest /= entries;
  }
  const int head = rest % sizes.heads, slice = rest / sizes.heads;
  const int head_kv = head / (sizes.heads / sizes.heads_kv);
  const int lane = lane_in_group(), group = threadIdx.x / LANES;
  const Acc scale2 = scale * LOG2_E;
  const long long at = head * params.rpb.head + entry[0] * params.rpb.axis[0] + entry[1] * params.rpb.axis[1] +
                       entry[2] * params.rpb.axis[2];
  const Acc bias2 = LOG2_E * widen(rpb[at]);

  const Index queries = items(sizes, 1), part = (queries + sizes.slices - 1) / sizes.slices;
  const Index first = slice * part, end = queries - first < part ? queries : first + part;
  Acc sum = 0;
  const Place step = place_of(GROUPS, sizes, 1);
  Place from = place_of(first + group, sizes, 1), to;
  for (Index query = first + group; query < end && first < queries; query += GROUPS, advance(from, step, sizes, 1)) {
    if (!key_at(sizes, entry, from, to)) continue;
    RawRow<HEAD_DIM> q_row, k_row;
    RawRow<HEAD_DIM_V> gradient, value;
    q_row.load(q + from.offset(params.q, head), lane);
    k_row.load(k + to.offset(params.k, head_kv), lane);
    gradient.load(d_out + from.offset(params.d_out, head), lane);
    value.load(v + to.offset(params.v, head_kv), lane);
    const QueryScalars scalars{LOG2_E * lse[from.offset(params.lse, head)], delta[from.offset(params.delta, head)]};
    sum += PairGradient(raw_dot(q_row, k_row), raw_dot(gradient, value), scale2, bias2, scalars).ds;
  }

  __shared__ Acc of_group[GROUPS];
  if (lane == 0) of_group[group] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    Acc total = 0;
    for (int g = 0; g < GROUPS; ++g) total += of_group[g];
    partials[blockIdx.x] = total;
  }
}
