// Neighbourhood attention, forward: out and lse. Any valid problem.
//
// One group of LANES lanes owns one query of one head. It walks the query's window, row by row of
// the last axis and STRIP keys at a time, with an online softmax (Milakov and Gimelshein, 2018): the
// running maximum, the sum and the output are rescaled whenever a strip raises the maximum.
//
//        map, axes 1 and 2               query Q, its window, and one strip of 4 keys
//      . . . . . . . . . . . .
//      . . + + + + + . . . . .           for n0 in window:            (axis 0, outermost)
//      . . + + + + + . . . . .             for n1 in window:
//      . . + + Q + + . . . . .               for strips of n2:  scores = scale q.k + bias
//      . . [# # # #] + . . . .                                  p = exp(scores - maximum)
//      . . + + + + + . . . . .                                  out = out * rescale + p v
//
// Scores are kept in units of log 2, so that exp is one exp2. Lanes past the window's end repeat its
// last key with a score of -infinity: they read real memory and weigh nothing.
#include "common/dropout.cuh"

struct Params {
  Sizes sizes;
  Layout q, k, v, rpb, additional_keys, additional_values, out, lse;
};

struct OnlineSoftmax {
  Row<HEAD_DIM_V> out;
  Acc sum = 0;
  Acc top = Acc(-3.0e38);  // finite: a first strip of -infinity (a bias may mask) must not give NaN

  // `factor(u)` is what dropout multiplies the u-th weight with; the sum is that of all weights.
  template <typename Factor>
  __device__ __forceinline__ void add(Acc (&score)[STRIP], const RawRow<HEAD_DIM_V> (&value)[STRIP], Factor factor) {
    Acc raised = top;
#pragma unroll
    for (int u = 0; u < STRIP; ++u) raised = score[u] > raised ? score[u] : raised;
    const Acc rescale = exp2(top - raised);
    top = raised;
    sum *= rescale;
#pragma unroll
    for (int i = 0; i < Share<HEAD_DIM_V>::size; ++i) out.x[i] *= rescale;
#pragma unroll
    for (int u = 0; u < STRIP; ++u) {
      const Acc p = exp2(score[u] - raised);
      sum += p;
      out.add(p * factor(u), value[u]);
    }
  }
};

// A strip of keys: `at(u)` is the index of its u-th key, `bias(u)` the score's bias in units of log 2.
template <typename At, typename Bias, typename Factor>
__device__ __forceinline__ void attend(OnlineSoftmax& softmax, const Row<HEAD_DIM>& query, Acc scale2, int lane,
                                       const Element* keys, long long key_stride, const Element* values,
                                       long long value_stride, int count, At at, Bias bias, Factor factor) {
  RawRow<HEAD_DIM> key[STRIP];
  RawRow<HEAD_DIM_V> value[STRIP];
  Acc score[STRIP];
#pragma unroll
  for (int u = 0; u < STRIP; ++u) {
    const int x = at(smaller(u, count - 1));
    key[u].load(keys + x * key_stride, lane);
    value[u].load(values + x * value_stride, lane);
  }
#pragma unroll
  for (int u = 0; u < STRIP; ++u) score[u] = group_sum(query.dot(key[u])) * scale2 + bias(smaller(u, count - 1));
#pragma unroll
  for (int u = 1; u < STRIP; ++u)
    if (u >= count) score[u] = -infinity();
  softmax.add(score, value, factor);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    general_forward(const Element* __restrict__ q,                  // [batch, x0, x1, x2, heads, HEAD_DIM]
                    const Element* __restrict__ k,                  // [batch, x0, x1, x2, heads_kv, HEAD_DIM]
                    const Element* __restrict__ v,                  // [batch, x0, x1, x2, heads_kv, HEAD_DIM_V]
                    const BiasElement* __restrict__ rpb,            // [heads, 2 k0 - 1, 2 k1 - 1, 2 k2 - 1]
                    const Element* __restrict__ additional_keys,    // [batch, extra, heads_kv, HEAD_DIM]
                    const Element* __restrict__ additional_values,  // [batch, extra, heads_kv, HEAD_DIM_V]
                    const unsigned* __restrict__ dropout_seed,      // [1], or null
                    Element* __restrict__ out,                      // [batch, x0, x1, x2, heads, HEAD_DIM_V]
                    Acc* __restrict__ lse,                          // [batch, x0, x1, x2, heads], or null
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
  Row<HEAD_DIM> query;
  query.load(q + place.offset(params.q, place.head), lane);
  OnlineSoftmax softmax;

  for (int n0 = w0.start; n0 < w0.end; ++n0) {
    for (int n1 = w1.start; n1 < w1.end; ++n1) {
      const int y0 = s0.position(sizes.axis[0], n0), y1 = s1.position(sizes.axis[1], n1);
      const Element* keys = k + offset_of(params.k, place.batch, y0, y1, 0, head_kv);
      const Element* values = v + offset_of(params.v, place.batch, y0, y1, 0, head_kv);
#ifdef RPB
      const BiasElement* row = rpb + place.head * params.rpb.head +
                               bias_entry(sizes, params.rpb, 0, n0, s0.inside) +
                               bias_entry(sizes, params.rpb, 1, n1, s1.inside);
#endif
      for (int n2 = w2.start; n2 < w2.end; n2 += STRIP) {
        const auto at = [&](int u) { return s2.position(sizes.axis[2], n2 + u); };
        const auto bias = [&](int u) -> Acc {
#ifdef RPB
          return LOG2_E * widen(row[bias_entry(sizes, params.rpb, 2, n2 + u, s2.inside)]);
#else
          return 0;
#endif
        };
        const int first = place_in_window(sizes, n0 - w0.start, n1 - w1.start, n2 - w2.start);
        attend(softmax, query, scale2, lane, keys, params.k.axis[2], values, params.v.axis[2], w2.end - n2, at, bias,
               [&](int u) { return dropout.factor(first + u); });
      }
    }
  }
  const Element* keys = additional_keys + offset_of(params.additional_keys, place.batch, 0, 0, 0, head_kv);
  const Element* values = additional_values + offset_of(params.additional_values, place.batch, 0, 0, 0, head_kv);
  for (int e = 0; e < sizes.extra; e += STRIP) {
    attend(softmax, query, scale2, lane, keys, params.additional_keys.axis[2], values,
           params.additional_values.axis[2], sizes.extra - e, [&](int u) { return e + u; },
           [](int) -> Acc { return 0; }, [&](int u) { return dropout.factor(sizes.places - sizes.extra + e + u); });
  }

  softmax.out.store(out + place.offset(params.out, place.head), lane, Acc(1) / softmax.sum);
  if (lse != nullptr && lane == 0)
    lse[place.offset(params.lse, place.head)] = LN_2 * (softmax.top + log2(softmax.sum));
}
