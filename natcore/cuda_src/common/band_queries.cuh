// Queries stay: dq of a tile of queries, and its share of drpb.
//
//   S^T = K Q^T, dP^T = V dO^T - delta, P = exp(S - lse), dS = P dP, dQ^T += K^T dS^T
#pragma once

#include "common/band_tables.cuh"
#include "common/band_tiles.cuh"

// The warp's own table of drpb.
__device__ __forceinline__ float* sums_of(unsigned char* shared) {
  return reinterpret_cast<float*>(shared + SUMS_AT) + warp_here() * ENTRIES;
}

// dq of a tile of queries, and its share of drpb. Does nothing where the map has ended.
__device__ __forceinline__ void query_tile(const Step& step, const Tables& tables, int item, const Scales& scales,
                                           unsigned char* shared, BiasSums& sums, Element* dq,
                                           const Layout& dq_layout) {
  const int tile = item % TILES, tile_column = tile * TILE_COLUMNS;  // within the region
  const Band<QUERY_LIST>& band = tables.queries[item / TILES];
  const int lane = lane_here();
  const int height = band.height, width = step.width - tile_column;
  if (height == 0 || width <= 0) return;
  const unsigned base = shared_address(shared);
  const float* table = reinterpret_cast<const float*>(shared + BIAS_AT);

  unsigned query[GROUPS][2 * D_STEPS], gradient[GROUPS][2 * V_STEPS];
  float lse[GROUPS][4], minus_delta[GROUPS][4], acc[GROUPS][D_STEPS][4] = {};
  int variant[GROUPS];
  const int own = band.own[lane % 8 % BAND], own_column = tile_column + lane % 8 / BAND + QUERY_PAD;
  const int token = lane % 4 * 2, token_column = tile_column + token / BAND + QUERY_PAD;
  int rows[2];  // of this lane's two tokens
  load_pair(rows, &band.own[token % BAND]);
  const float2* scalars[2];
#pragma unroll
  for (int e = 0; e < 2; ++e)
    scalars[e] = reinterpret_cast<const float2*>(shared + SCALARS_AT) + rows[e] * QUERY_COLUMNS + token_column;
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    const int column = g * GROUP_COLUMNS;
    load_group<D_STEPS>(query[g], base + Q_AT + own * Q_ROW + (own_column + column) * D_TOKEN, lane);
    load_group<V_STEPS>(gradient[g], base + G_AT + own * G_ROW + (own_column + column) * V_TOKEN, lane);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float2 pair = scalars[e][column];
      lse[g][e] = lse[g][e + 2] = pair.x;
      minus_delta[g][e] = minus_delta[g][e + 2] = pair.y;
    }
    variant[g] = tables.column[token_column + column] - KEY_PAD;
  }

  const int count = band.count;
#pragma unroll 1
  for (int first = 0; first < count; first += BLOCK_ROWS) {
    int slot[ROW_HALVES];
    const float* bias[2][2];  // of token e and half h
#pragma unroll
    for (int h = 0; h < ROW_HALVES; ++h) {
      slot[h] = band.slot[first + lane % 8 + 8 * h];
      int at[2];
      load_pair(at, &band.table[first + lane / 4 + 8 * h][token % BAND]);
      bias[0][h] = table + at[0], bias[1][h] = table + at[1];
    }
    if (ROW_HALVES == 1) bias[0][1] = bias[0][0] + 1, bias[1][1] = bias[1][0] + 1;
    const unsigned key_block = base + K_AT + block_row<K_ROW, D_TOKEN>(slot, 3, 4, lane);
    const unsigned key_block_t = base + K_AT + block_row<K_ROW, D_TOKEN>(slot, 4, 3, lane);
    const unsigned value_block = base + V_AT + block_row<V_ROW, V_TOKEN>(slot, 3, 4, lane);
    sums.turn_to(band, first, sums_of(shared));

    Block blocks[2];
    // The block at `column` of shared memory, for the groups that are active.
    const auto load = [&](Block& block, int column, const bool (&active)[GROUPS]) {
      block.load(key_block + column * D_TOKEN, value_block + column * V_TOKEN);
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        if (!active[g]) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) block.s[g][i] = bias[i % 2][i / 2][variant[g] + column];
      }
    };
    const auto differentiate = [&](Block& block, const bool (&active)[GROUPS]) {
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        if (!active[g]) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          block.dp[g][i] *= ex2_approx(fmaf(block.s[g][i], scales.exponent, -lse[g][i]));
      }
    };
    const auto finish = [&](const Block& block, const unsigned (&transposed)[D_STEPS][4],
                            const bool (&active)[GROUPS]) {
      unsigned ds[GROUPS][2];
#pragma unroll
      for (int g = 0; g < GROUPS; ++g)
        if (active[g]) as_operand(ds[g], block.dp[g]);
      multiply_transposed<D_STEPS>(acc, transposed, ds, active);
    };

    const int left = tile_column + KEY_PAD - QUERY_LEFT;
    constexpr int BLOCKS = (GROUPS - 1) * STEP + QUERY_BLOCKS;
    bool active[BLOCKS + 1][GROUPS];
#pragma unroll
    for (int b = 0; b <= BLOCKS; ++b)
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) active[b][g] = b >= g * STEP && b < g * STEP + QUERY_BLOCKS;
    if (PIPELINED) {
      load(blocks[0], left, active[0]);
      blocks[0].multiply(query, gradient, minus_delta, active[0]);
    }
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      Block& block = blocks[PIPELINED ? b % 2 : 0];
      Block& next = blocks[PIPELINED ? (b + 1) % 2 : 0];
      if (PIPELINED && b + 1 < BLOCKS) load(next, left + (b + 1) * BLOCK_COLUMNS, active[b + 1]);
      if (!PIPELINED) {
        load(block, left + b * BLOCK_COLUMNS, active[b]);
        block.multiply(query, gradient, minus_delta, active[b]);
      }
      unsigned transposed[D_STEPS][4];
      load_transposed(transposed, key_block_t + (left + b * BLOCK_COLUMNS) * D_TOKEN);
      differentiate(block, active[b]);
      if (PIPELINED && b + 1 < BLOCKS) next.multiply(query, gradient, minus_delta, active[b + 1]);
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        if (!active[b][g]) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.sum[sum_of(b, g)][i] += block.dp[g][i];
      }
      finish(block, transposed, active[b]);
    }
#if QUERY_EXTRA
    if (tables.query_extra[tile]) {
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        ExtraColumns extra = extra_columns<true>(step.region, tile_column + g * GROUP_COLUMNS);
        bool only[GROUPS];
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) only[i] = i == g;
#pragma unroll 1
        for (int c; extra.next(c);) {
          load(blocks[0], c + KEY_PAD, only);
          blocks[0].multiply(query, gradient, minus_delta, only);
          unsigned transposed[D_STEPS][4];
          load_transposed(transposed, key_block_t + (c + KEY_PAD) * D_TOKEN);
          differentiate(blocks[0], only);
          sums.add(blocks[0].dp[g], c - tile_column - g * GROUP_COLUMNS, sums_of(shared), lane_here());
          finish(blocks[0], transposed, only);
        }
      }
    }
#endif
  }

  if (dq != nullptr)
    store_tile<HEAD_DIM>(dq, step.dq, dq_layout, step, tables.queries, anew(item), shared, acc, scales.result);
}
