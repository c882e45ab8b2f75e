// Attention dropout: which weights a seed keeps. Defined in natcore/reference_dropout.py.
//
//   number of the weight in [batch, x0, x1, x2, heads, places]  --Philox-2x32-10, keyed by the seed-->  word
//   word >= threshold: the weight is divided by 1 - p; else it becomes 0
//
// Any kernel may ask for any weight, in any order. Without the define DROPOUT every factor is 1, and all
// of this is compiled away.
#pragma once

#include "common/general.cuh"

// The first word of Philox-2x32-10 (Salmon et al., SC 2011) at a counter.
__device__ __forceinline__ unsigned philox(unsigned long long counter, unsigned key) {
  unsigned low = static_cast<unsigned>(counter), high = static_cast<unsigned>(counter >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned long long product = static_cast<unsigned long long>(low) * 0xD256D193u;
    low = static_cast<unsigned>(product >> 32) ^ key ^ high;
    high = static_cast<unsigned>(product);
    key += 0x9E3779B9u;
  }
  return low;
}

// Of the weights of one query of one head.
struct Dropout {
#ifdef DROPOUT
  unsigned long long first;
  unsigned seed, threshold;
  Acc kept;
  __device__ __forceinline__ Dropout(const Sizes& sizes, const unsigned* seed, unsigned long long query)
      : first(query * sizes.places), seed(*seed), threshold(sizes.dropout_threshold),
        kept(static_cast<Acc>(sizes.dropout_factor)) {}
  __device__ __forceinline__ Acc factor(int place) const {
    return philox(first + place, seed) >= threshold ? kept : Acc(0);
  }
#else
  __device__ __forceinline__ Dropout(const Sizes&, const unsigned*, unsigned long long) {}
  __device__ __forceinline__ Acc factor(int) const { return 1; }
#endif
};
