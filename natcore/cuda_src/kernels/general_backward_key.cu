// dk and dv, key-stationary: each key gathers from the queries that see it.
//
// One group of LANES lanes owns one key of one kv head, holds k, v, dk and dv, and walks the queries
// that see the key, STRIP at a time, for every query head of its kv head. On each axis these queries
// are one run (common/window.cuh), found exactly, so there is nothing to mask:
//
//      + + + + + . . . . .          a key near a corner of the map, window 5x5: windows are
//      + K + + + . . . . .          clamped to the map, so more queries see it on the border's
//      + + + + + . . . . .          side than its own window holds keys
//      [# # # #] + . . . .
//      . . . . . . . . . .          ds as in general_backward_query;  dk += scale ds q,  dv += p d_out
//
// Nobody else writes this dk and dv: no atomics, and the order of the sums is fixed.
#include "common/dropout.cuh"
#include "common/general_backward.cuh"

struct Params {
  Sizes sizes;
  Layout d_out, q, k, v, lse, delta, rpb, dk, dv;
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    general_backward_key(const Element* __restrict__ d_out,    // [batch, x0, x1, x2, heads, HEAD_DIM_V]
                         const Element* __restrict__ q,        // [batch, x0, x1, x2, heads, HEAD_DIM]
                         const Element* __restrict__ k,        // [batch, x0, x1, x2, heads_kv, HEAD_DIM]
                         const Element* __restrict__ v,        // [batch, x0, x1, x2, heads_kv, HEAD_DIM_V]
                         const Acc* __restrict__ lse,          // [batch, x0, x1, x2, heads]
                         const Acc* __restrict__ delta,        // [batch, x0, x1, x2, heads]
                         const BiasElement* __restrict__ rpb,  // [heads, 2 k0 - 1, 2 k1 - 1, 2 k2 - 1]
                         const unsigned* __restrict__ dropout_seed,  // [1], or null
                         Element* __restrict__ dk,             // [batch, x0, x1, x2, heads_kv, HEAD_DIM], or null
                         Element* __restrict__ dv,             // [batch, x0, x1, x2, heads_kv, HEAD_DIM_V], or null
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

  const Acc scale2 = scale * LOG2_E;
  Row<HEAD_DIM> key, d_key;
  Row<HEAD_DIM_V> value, d_value;
  key.load(k + place.offset(params.k, place.head), lane);
  value.load(v + place.offset(params.v, place.head), lane);

  for (int head = place.head * heads_per_kv; head < (place.head + 1) * heads_per_kv; ++head) {
    for (int p0 = w0.start; p0 < w0.end; ++p0) {
      const int seen0 = s0.inside - keys_of(sizes.axis[0], p0, s0.length).start;  // the key's place in p0's window
      for (int p1 = w1.start; p1 < w1.end; ++p1) {
        const int seen1 = s1.inside - keys_of(sizes.axis[1], p1, s1.length).start;
        const int x0 = s0.position(sizes.axis[0], p0), x1 = s1.position(sizes.axis[1], p1);
        const Element* queries = q + offset_of(params.q, place.batch, x0, x1, 0, head);
        const Element* gradients = d_out + offset_of(params.d_out, place.batch, x0, x1, 0, head);
        const Acc* lse_row = lse + offset_of(params.lse, place.batch, x0, x1, 0, head);
        const Acc* delta_row = delta + offset_of(params.delta, place.batch, x0, x1, 0, head);
#ifdef RPB
        const BiasElement* table = rpb + head * params.rpb.head + bias_entry(sizes, params.rpb, 0, s0.inside, p0) +
                                   bias_entry(sizes, params.rpb, 1, s1.inside, p1);
#endif
        for (int p2 = w2.start; p2 < w2.end; p2 += STRIP) {
          RawRow<HEAD_DIM> query[STRIP];
          RawRow<HEAD_DIM_V> gradient[STRIP];
          QueryScalars scalars[STRIP];
          Acc bias2[STRIP] = {};
#pragma unroll
          for (int u = 0; u < STRIP; ++u) {
            const int p = smaller(p2 + u, w2.end - 1), x2 = s2.position(sizes.axis[2], p);
            query[u].load(queries + x2 * params.q.axis[2], lane);
            gradient[u].load(gradients + x2 * params.d_out.axis[2], lane);
            scalars[u] = {LOG2_E * lse_row[x2 * params.lse.axis[2]], delta_row[x2 * params.delta.axis[2]]};
#ifdef RPB
            bias2[u] = LOG2_E * widen(table[bias_entry(sizes, params.rpb, 2, s2.inside, p)]);
#endif
          }
#pragma unroll
          for (int u = 0; u < STRIP; ++u) {
            const int p = smaller(p2 + u, w2.end - 1), x2 = s2.position(sizes.axis[2], p);
            const Dropout dropout(sizes, dropout_seed, number_of(sizes, place.batch, x0, x1, x2, head));
            const int seen2 = s2.inside - keys_of(sizes.axis[2], p, s2.length).start;
            const Acc factor = dropout.factor(place_in_window(sizes, seen0, seen1, seen2));
            const Acc qk = group_sum(key.dot(query[u])), dp = factor * group_sum(value.dot(gradient[u]));
            const PairGradient pair(qk, dp, scale2, bias2[u], scalars[u]);
            const bool real = p2 + u < w2.end;  // the last query repeats past the end
            d_key.add(real ? pair.ds : Acc(0), query[u]);
            d_value.add(real ? pair.p * factor : Acc(0), gradient[u]);
          }
        }
      }
    }
  }
  if (dk != nullptr) d_key.store(dk + place.offset(params.dk, place.head), lane, scale);
  if (dv != nullptr) d_value.store(dv + place.offset(params.dv, place.head), lane, Acc(1));
}
