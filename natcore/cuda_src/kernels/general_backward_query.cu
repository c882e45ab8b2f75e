// dq and delta, query-stationary: the backward counterpart of general_forward, with the same walk.
//
// One group of LANES lanes owns one query of one head, holds q and d_out, and walks the query's
// window STRIP keys at a time. delta = sum p dP - d_lse is known only at the end, so the sum for dq is
// kept in two parts, and the walk is done once:
//
//      . . + + + + + . . .          s  = scale q.k + bias         (recomputed)
//      . . + + Q + + . . .          p  = exp(s - lse),  dP = d_out . v
//      . . [# # # #] + . .          with_dp += p dP k,  with_p += p k,  sum += p dP
//      . . + + + + + . . .          at the end: dq = scale (with_dp - delta with_p)
//
// The other kernels read delta from the workspace. Taking d_out . out for the sum would be cheaper, but
// out has been rounded to 16 bits, and drpb, whose entries nearly cancel, shows it.
//
// Nobody else writes this dq: no atomics, and the order of the sums is fixed.
#include "common/dropout.cuh"
#include "common/general_backward.cuh"

struct Params {
  Sizes sizes;
  Layout d_out, q, k, v, lse, d_lse, rpb, additional_keys, additional_values, delta, dq;
};

struct QueryRows {
  Row<HEAD_DIM> q, with_dp, with_p;
  Row<HEAD_DIM_V> d_out;
  Acc lse2, sum = 0;
};

// A strip of `count` or more keys: `at(u)` is the index of its u-th key, `bias(u)` its bias in units of log 2,
// `factor(u)` what dropout multiplies its weight with.
template <typename At, typename Bias, typename Factor>
__device__ __forceinline__ void visit(QueryRows& rows, Acc scale2, int lane, const Element* keys, long long key_stride,
                                      const Element* values, long long value_stride, int count, At at, Bias bias,
                                      Factor factor) {
  RawRow<HEAD_DIM> key[STRIP];
  RawRow<HEAD_DIM_V> value[STRIP];
#pragma unroll
  for (int u = 0; u < STRIP; ++u) {
    const int x = at(smaller(u, count - 1));
    key[u].load(keys + x * key_stride, lane);
    value[u].load(values + x * value_stride, lane);
  }
#pragma unroll
  for (int u = 0; u < STRIP; ++u) {
    const Acc qk = group_sum(rows.q.dot(key[u])), dp = factor(u) * group_sum(rows.d_out.dot(value[u]));
    const Acc p = u < count ? exp2(qk * scale2 + bias(smaller(u, count - 1)) - rows.lse2) : Acc(0);
    rows.with_dp.add(p * dp, key[u]);
    rows.with_p.add(p, key[u]);
    rows.sum += p * dp;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    general_backward_query(const Element* __restrict__ d_out,              // [batch, x0, x1, x2, heads, HEAD_DIM_V]
                           const Element* __restrict__ q,                  // [batch, x0, x1, x2, heads, HEAD_DIM]
                           const Element* __restrict__ k,                  // [batch, x0, x1, x2, heads_kv, HEAD_DIM]
                           const Element* __restrict__ v,                  // [batch, x0, x1, x2, heads_kv, HEAD_DIM_V]
                           const Acc* __restrict__ lse,                    // [batch, x0, x1, x2, heads]
                           const Acc* __restrict__ d_lse,                  // [batch, x0, x1, x2, heads], or null: zeros
                           const BiasElement* __restrict__ rpb,            // [heads, 2 k0 - 1, 2 k1 - 1, 2 k2 - 1]
                           const Element* __restrict__ additional_keys,    // [batch, extra, heads_kv, HEAD_DIM]
                           const Element* __restrict__ additional_values,  // [batch, extra, heads_kv, HEAD_DIM_V]
                           const unsigned* __restrict__ dropout_seed,      // [1], or null
                           Acc* __restrict__ delta,                        // [batch, x0, x1, x2, heads]
                           Element* __restrict__ dq,                       // [batch, x0, x1, x2, heads, HEAD_DIM], or null
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

  const Dropout dropout(sizes, dropout_seed, item);
  const Acc scale2 = scale * LOG2_E;
  QueryRows rows;
  rows.q.load(q + place.offset(params.q, place.head), lane);
  rows.d_out.load(d_out + place.offset(params.d_out, place.head), lane);
  rows.lse2 = LOG2_E * lse[place.offset(params.lse, place.head)];

  for (int n0 = w0.start; n0 < w0.end; ++n0) {
    for (int n1 = w1.start; n1 < w1.end; ++n1) {
      const int y0 = s0.position(sizes.axis[0], n0), y1 = s1.position(sizes.axis[1], n1);
      const Element* keys = k + offset_of(params.k, place.batch, y0, y1, 0, head_kv);
      const Element* values = v + offset_of(params.v, place.batch, y0, y1, 0, head_kv);
#ifdef RPB
      const BiasElement* table = rpb + place.head * params.rpb.head +
                                 bias_entry(sizes, params.rpb, 0, n0, s0.inside) +
                                 bias_entry(sizes, params.rpb, 1, n1, s1.inside);
#endif
      for (int n2 = w2.start; n2 < w2.end; n2 += STRIP) {
        const auto at = [&](int u) { return s2.position(sizes.axis[2], n2 + u); };
        const auto bias = [&](int u) -> Acc {
#ifdef RPB
          return LOG2_E * widen(table[bias_entry(sizes, params.rpb, 2, n2 + u, s2.inside)]);
#else
          return 0;
#endif
        };
        const int first = place_in_window(sizes, n0 - w0.start, n1 - w1.start, n2 - w2.start);
        visit(rows, scale2, lane, keys, params.k.axis[2], values, params.v.axis[2], w2.end - n2, at, bias,
              [&](int u) { return dropout.factor(first + u); });
      }
    }
  }
  const Element* keys = additional_keys + offset_of(params.additional_keys, place.batch, 0, 0, 0, head_kv);
  const Element* values = additional_values + offset_of(params.additional_values, place.batch, 0, 0, 0, head_kv);
  for (int e = 0; e < sizes.extra; e += STRIP) {
    visit(rows, scale2, lane, keys, params.additional_keys.axis[2], values, params.additional_values.axis[2],
          sizes.extra - e, [&](int u) { return e + u; }, [](int) -> Acc { return 0; },
          [&](int u) { return dropout.factor(sizes.places - sizes.extra + e + u); });
  }

  const Acc own_delta = rows.sum - (d_lse == nullptr ? Acc(0) : d_lse[place.offset(params.d_lse, place.head)]);
  if (lane == 0) delta[place.offset(params.delta, place.head)] = own_delta;
  if (dq == nullptr) return;
  rows.with_dp.add(-own_delta, rows.with_p);
  rows.with_dp.store(dq + place.offset(params.dq, place.head), lane, scale);
}
