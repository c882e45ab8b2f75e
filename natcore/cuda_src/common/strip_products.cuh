// The products and the softmax of the marching forward's tiles, all in registers.
#pragma once

#include "common/strip_bias.cuh"
#include "common/strip_tile.cuh"
#include "ptx/math.cuh"

using Scores = float[GROUPS][BLOCKS][4];  // element i: key i / 2 * 8 + lane / 4 of a block, query 2 (lane % 4) + i % 2

// S = bias + mask + K Q^T of a tile. `keys` is where this lane's key of the first block lies, for each step; `bias`, of
// query e of its pair and key half h, the bias of the first block's first column.
template <int KIND>
__device__ __forceinline__ void score(Scores& s, const unsigned (&query)[GROUPS][2 * D_STEPS],
                                      const unsigned (&keys)[D_STEPS],
                                      const float* const (&bias)[2][2], unsigned lacks, int lane) {
  unsigned mask[GROUPS][2];
  as_masks(mask, KIND == INNER ? 0 : lacks);
#pragma unroll
  for (int b = 0; b < blocks_of(KIND); ++b) {
    if (!is_taken(KIND, b)) continue;
    unsigned key[D_STEPS][4];
    load_block(key, keys, b * SeenD::BLOCK);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      if (!takes(KIND, g, b)) continue;
      const int own = b - g * STEP;
      float(&c)[4] = s[g][own];
      const int column = own * BLOCK_COLUMNS;
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] = bias[i % 2][i / 2][column];
      if (KIND != INNER) mask_columns(c, own, mask[g], lane);
      multiply<Element>(c, key, query[g], c);
    }
  }
}

// Scores become exp2(unit (s - top)).
template <int KIND>
__device__ __forceinline__ void soften(Scores& s, float (&top)[GROUPS][2], float unit) {
#pragma unroll
  for (int g = 0; g < groups_of(KIND); ++g) {
    const int first = range_of(KIND, 2 * g) - g * STEP, end = range_of(KIND, 2 * g + 1) - g * STEP;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float most = fmaxf(s[g][first][e], s[g][first][e + 2]);
#pragma unroll
      for (int b = first + 1; b < end; ++b) most = fmaxf(most, fmaxf(s[g][b][e], s[g][b][e + 2]));
#pragma unroll
      for (int other = 4; other < 32; other *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, other));
      top[g][e] = most;
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float shift = top[g][e] * unit;
#pragma unroll
      for (int b = first; b < end; ++b) {
#pragma unroll
        for (int i = e; i < 4; i += 2) s[g][b][i] = ex2_approx(__fmaf_rn(s[g][b][i], unit, -shift));
      }
    }
  }
}

// O^T = V^T P^T. `values` is where this lane's key of the first block lies, for each step. A product with ones sums the
// weights as they are rounded for O; all rows of `sum` are the same.
template <int KIND>
__device__ __forceinline__ void weigh(float (&o)[GROUPS][V_STEPS][4], float (&sum)[GROUPS][4], const Scores& p,
                                      const unsigned (&values)[V_STEPS]) {
  const unsigned ones = pack<Element>(1.f, 1.f);
#pragma unroll
  for (int b = 0; b < blocks_of(KIND); ++b) {
    if (!is_taken(KIND, b)) continue;
    unsigned value[V_STEPS][4], weight[GROUPS][2];
    load_transposed(value, values, b * SeenV::BLOCK);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      if (!takes(KIND, g, b)) continue;
      as_operand(weight[g], p[g][b - g * STEP]);
      multiply_transposed<Element>(o[g], value, weight[g]);
      Mma<Element>::m16n8k16(sum[g], ones, ones, ones, ones, weight[g][0], weight[g][1], sum[g]);
    }
  }
}

// O^T of a tile, not yet divided by its `sum`, and of each query the greatest score.
struct Attend {
  template <int KIND>
  static __device__ __forceinline__ void run(float (&o)[GROUPS][V_STEPS][4], float (&sum)[GROUPS][4],
                                             float (&top)[GROUPS][2], const unsigned (&query)[GROUPS][2 * D_STEPS],
                                             const unsigned (&keys)[D_STEPS], const unsigned (&values)[V_STEPS],
                                             const float* const (&bias)[2][2], const unsigned& lacks,
                                             const float& unit, const int& lane) {
    Scores s;
    score<KIND>(s, query, keys, bias, lacks, lane);
    soften<KIND>(s, top, unit);
    weigh<KIND>(o, sum, s, values);
  }
};
