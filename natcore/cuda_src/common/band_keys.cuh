// Keys stay: dk and dv of a tile of keys, the mirror image of band_queries.cuh.
//
//   S = Q K^T, dP = dO V^T - delta, dV^T += dO^T P, dK^T += Q^T dS
#pragma once

#include "common/band_tables.cuh"
#include "common/band_tiles.cuh"

// dk and dv of a tile of keys. Does nothing where the map has ended.
__device__ __forceinline__ void key_tile(const Step& step, const Tables& tables, int item, const Scales& scales,
                                         unsigned char* shared, Element* dk, Element* dv, const Layout& dk_layout,
                                         const Layout& dv_layout) {
  const int tile = item % TILES, tile_column = tile * TILE_COLUMNS;  // within the region
  const Band<KEY_LIST>& band = tables.keys[item / TILES];
  const int lane = lane_here();
  const int height = band.height, width = step.width - tile_column;
  if (height == 0 || width <= 0) return;
  const unsigned base = shared_address(shared);
  const float* table = reinterpret_cast<const float*>(shared + BIAS_AT);

  unsigned key[GROUPS][2 * D_STEPS], value[GROUPS][2 * V_STEPS];
  float dk_acc[GROUPS][D_STEPS][4] = {}, dv_acc[GROUPS][V_STEPS][4] = {};
  const int own = band.own[lane % 8 % BAND], own_column = tile_column + lane % 8 / BAND + KEY_PAD;
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    const int column = own_column + g * GROUP_COLUMNS;
    load_group<D_STEPS>(key[g], base + K_AT + own * K_ROW + column * D_TOKEN, lane);
    load_group<V_STEPS>(value[g], base + V_AT + own * V_ROW + column * V_TOKEN, lane);
  }

  const int count = band.count;
#pragma unroll 1
  for (int first = 0; first < count; first += BLOCK_ROWS) {
    int slot[ROW_HALVES];
    const float* bias[2][2];  // of token e and half h
    const float2* scalars[2];
#pragma unroll
    for (int h = 0; h < ROW_HALVES; ++h) {
      slot[h] = band.slot[first + lane % 8 + 8 * h];
      const int row = first + lane / 4 + 8 * h, token = lane % 4 * 2;
      scalars[h] = reinterpret_cast<const float2*>(shared + SCALARS_AT) + band.slot[row] * QUERY_COLUMNS;
      int at[2];
      load_pair(at, &band.table[row][token % BAND]);
      bias[0][h] = table + at[0] + token / BAND + tile_column, bias[1][h] = bias[0][h] + (at[1] - at[0]);
    }
    if (ROW_HALVES == 1) scalars[1] = scalars[0] + 1, bias[0][1] = bias[0][0], bias[1][1] = bias[1][0];
    const unsigned query_block = base + Q_AT + block_row<Q_ROW, D_TOKEN>(slot, 3, 4, lane);
    const unsigned query_block_t = base + Q_AT + block_row<Q_ROW, D_TOKEN>(slot, 4, 3, lane);
    const unsigned gradient_block = base + G_AT + block_row<G_ROW, V_TOKEN>(slot, 3, 4, lane);
    const unsigned gradient_block_t = base + G_AT + block_row<G_ROW, V_TOKEN>(slot, 4, 3, lane);

    struct Queries : Block {
      float lse[4], minus_delta[1][4];
    };
    Queries blocks[2];
    const auto load = [&](Queries& block, int at, const bool (&active)[GROUPS]) {
      block.load(query_block + at * D_TOKEN, gradient_block + at * V_TOKEN);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 pair = scalars[h][at];
        const int column = tables.column[at + (ROW_HALVES == 2 ? 0 : h)];
        block.lse[2 * h] = block.lse[2 * h + 1] = pair.x;
        block.minus_delta[0][2 * h] = block.minus_delta[0][2 * h + 1] = pair.y;
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
          if (!active[g]) continue;
#pragma unroll
          for (int e = 0; e < 2; ++e) block.s[g][2 * h + e] = bias[e][h][column + g * GROUP_COLUMNS];
        }
      }
    };
    const auto differentiate = [&](Queries& block, const bool (&active)[GROUPS]) {
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        if (!active[g]) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          block.s[g][i] = ex2_approx(fmaf(block.s[g][i], scales.exponent, -block.lse[i]));
          block.dp[g][i] *= block.s[g][i];
        }
      }
    };
    const auto finish = [&](const Queries& block, int at, const bool (&active)[GROUPS]) {
      unsigned p[GROUPS][2], ds[GROUPS][2], of_v[V_STEPS][4], of_d[D_STEPS][4];
      load_transposed(of_v, gradient_block_t + at * V_TOKEN);
#pragma unroll
      for (int g = 0; g < GROUPS; ++g)
        if (active[g]) as_operand(p[g], block.s[g]);
      load_transposed(of_d, query_block_t + at * D_TOKEN);
#pragma unroll
      for (int g = 0; g < GROUPS; ++g)
        if (active[g]) as_operand(ds[g], block.dp[g]);
      multiply_transposed<V_STEPS>(dv_acc, of_v, p, active);
      multiply_transposed<D_STEPS>(dk_acc, of_d, ds, active);
    };

    const int left = tile_column + QUERY_PAD - KEY_LEFT;
    constexpr int BLOCKS = (GROUPS - 1) * STEP + KEY_BLOCKS;
    bool active[BLOCKS + 1][GROUPS];
#pragma unroll
    for (int b = 0; b <= BLOCKS; ++b)
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) active[b][g] = b >= g * STEP && b < g * STEP + KEY_BLOCKS;
    if (PIPELINED) {
      load(blocks[0], left, active[0]);
      blocks[0].multiply(key, value, blocks[0].minus_delta, active[0]);
    }
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      Queries& block = blocks[PIPELINED ? b % 2 : 0];
      Queries& next = blocks[PIPELINED ? (b + 1) % 2 : 0];
      if (PIPELINED && b + 1 < BLOCKS) load(next, left + (b + 1) * BLOCK_COLUMNS, active[b + 1]);
      if (!PIPELINED) {
        load(block, left + b * BLOCK_COLUMNS, active[b]);
        block.multiply(key, value, block.minus_delta, active[b]);
      }
      differentiate(block, active[b]);
      if (PIPELINED && b + 1 < BLOCKS) next.multiply(key, value, next.minus_delta, active[b + 1]);
      finish(block, left + b * BLOCK_COLUMNS, active[b]);
    }
#if KEY_EXTRA
    if (tables.key_extra[tile]) {
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        ExtraColumns extra = extra_columns<false>(step.region, tile_column + g * GROUP_COLUMNS);
        bool only[GROUPS];
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) only[i] = i == g;
#pragma unroll 1
        for (int c; extra.next(c);) {
          load(blocks[0], c + QUERY_PAD, only);
          blocks[0].multiply(key, value, blocks[0].minus_delta, only);
          differentiate(blocks[0], only);
          finish(blocks[0], c + QUERY_PAD, only);
        }
      }
    }
#endif
  }

  if (dk != nullptr)
    store_tile<HEAD_DIM>(dk, step.dk, dk_layout, step, tables.keys, anew(item), shared, dk_acc, scales.result);
  if (dv != nullptr)
    store_tile<HEAD_DIM_V>(dv, step.dv, dv_layout, step, tables.keys, anew(item), shared, dv_acc, 1.f);
}
