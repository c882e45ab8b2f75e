// d_additional_keys and d_additional_values, key-stationary. Every query sees every additional key.
//
// One block owns one additional key of one kv head and one slice of the queries of its batch entry;
// each group of LANES lanes takes every GROUPS-th of them and holds its own dk and dv:
//
//   queries of the slice   0 1 2 3 4 5 6 7 8 9 ...     (token-major, the kv head's query heads fastest)
//   group                  0 1 2 3 0 1 2 3 0 1 ...     each adds up its own,
//                           \ | | /
//                         shared memory                 then the groups are added in order
//
// general_sum_partials adds the slices. No atomics.
#include "common/dropout.cuh"
#include "common/general_backward.cuh"
#include "common/group_sums.cuh"

struct Params {
  Sizes sizes;
  Layout d_out, q, lse, delta, additional_keys, additional_values;
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    general_backward_additional(const Element* __restrict__ d_out,              // [batch, x0, x1, x2, heads, HEAD_DIM_V]
                                const Element* __restrict__ q,                  // [batch, x0, x1, x2, heads, HEAD_DIM]
                                const Acc* __restrict__ lse,                    // [batch, x0, x1, x2, heads]
                                const Acc* __restrict__ delta,                  // [batch, x0, x1, x2, heads]
                                const Element* __restrict__ additional_keys,    // [batch, extra, heads_kv, HEAD_DIM]
                                const Element* __restrict__ additional_values,  // [batch, extra, heads_kv, HEAD_DIM_V]
                                const unsigned* __restrict__ dropout_seed,      // [1], or null
                                Acc* __restrict__ dk_partials,  // [slices, batch, extra, heads_kv, HEAD_DIM]
                                Acc* __restrict__ dv_partials,  // [slices, batch, extra, heads_kv, HEAD_DIM_V]
                                const Acc scale, const __grid_constant__ Params params) {
  const Sizes& sizes = params.sizes;
  unsigned rest = blockIdx.x;
  const int head_kv = rest % sizes.heads_kv;
  rest /= sizes.heads_kv;
  const int e = rest % sizes.extra;
  rest /= sizes.extra;
  const int batch = rest % sizes.batch, slice = rest / sizes.batch;
  const int heads_per_kv = sizes.heads / sizes.heads_kv;
  const int lane = lane_in_group();
  const Acc scale2 = scale * LOG2_E;

  Row<HEAD_DIM> key, d_key;
  Row<HEAD_DIM_V> value, d_value;
  key.load(additional_keys + offset_of(params.additional_keys, batch, 0, 0, e, head_kv), lane);
  value.load(additional_values + offset_of(params.additional_values, batch, 0, 0, e, head_kv), lane);

  const Index queries = items(sizes, heads_per_kv) / sizes.batch, part = (queries + sizes.slices - 1) / sizes.slices;
  const Index first = slice * part, end = queries - first < part ? queries : first + part;
  const Place step = place_of(GROUPS, sizes, heads_per_kv);
  Index query = first + threadIdx.x / LANES;
  Place place = place_of(query, sizes, heads_per_kv);  // of a batch of one
  place.batch = batch;
  for (; query < end && first < queries; query += GROUPS, advance(place, step, sizes, heads_per_kv)) {
    const int head = head_kv * heads_per_kv + place.head;
    RawRow<HEAD_DIM> q_row;
    RawRow<HEAD_DIM_V> gradient;
    q_row.load(q + place.offset(params.q, head), lane);
    gradient.load(d_out + place.offset(params.d_out, head), lane);
    const QueryScalars scalars{LOG2_E * lse[place.offset(params.lse, head)], delta[place.offset(params.delta, head)]};
    const Dropout dropout(sizes, dropout_seed, number_of(sizes, batch, place.x[0], place.x[1], place.x[2], head));
    const Acc factor = dropout.factor(sizes.places - sizes.extra + e);
    const Acc qk = group_sum(key.dot(q_row)), dp = factor * group_sum(value.dot(gradient));
    const PairGradient pair(qk, dp, scale2, 0, scalars);
    d_key.add(pair.ds, q_row);
    d_value.add(pair.p * factor, gradient);
  }

  constexpr int widest = Share<HEAD_DIM>::size > Share<HEAD_DIM_V>::size ? Share<HEAD_DIM>::size : Share<HEAD_DIM_V>::size;
  __shared__ Acc shared[THREADS * widest];
  sum_groups(shared, d_key, scale, dk_partials + static_cast<long long>(blockIdx.x) * HEAD_DIM);
  sum_groups(shared, d_value, Acc(1), dv_partials + static_cast<long long>(blockIdx.x) * HEAD_DIM_V);
}
