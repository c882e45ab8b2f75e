// The arithmetic of one (query, key) pair in the backward. With s = scale q.k + bias, p = exp(s - lse)
// and dP = d_out . v:
//
//   dL/ds = p (dP - delta),   delta = sum over keys of p dP  -  d_lse
//
// and from there dq = scale sum dL/ds k, dk = scale sum dL/ds q, dv = sum p d_out, drpb = sum dL/ds.
// p is recomputed: nothing of the size of the attention matrix is ever stored. general_backward_query
// computes delta, which the key-, bias- and additional-stationary kernels read.
#pragma once

#include "common/general.cuh"

// What a query brings to each of its pairs.
struct QueryScalars {
  Acc lse2;  // lse in units of log 2
  Acc delta;
};

struct PairGradient {
  Acc p, ds;

  __device__ __forceinline__ PairGradient(Acc qk, Acc dp, Acc scale2, Acc bias2, const QueryScalars& query)
      : p(exp2(qk * scale2 + bias2 - query.lse2)), ds(p * (dp - query.delta)) {}
};
