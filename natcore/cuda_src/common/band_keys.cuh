// Keys stay: dk and dv of a tile of keys, the mirror image of band_queries.cuh.
//
//   S = Q K^T, dP = dO V^T - delta, dV^T += dO^T P, dK^T += Q^T dS
#pragma once

#include "common/band_bias.cuh"
#include "common/band_tiles.cuh"

// dk and dv of a tile of keys.
__device__ __forceinline__ void key_tile(const Step& step, const Place& place, const Scales& scales,
                                         unsigned char* shared, const int* column_table, Element* dk, Element* dv,
                                         const Layout& dk_layout, const Layout& dv_layout, int lane) {
  const Region& region = step.region;
  const unsigned base = shared_address(shared);
  const float* table = reinterpret_cast<const float*>(shared + TABLE_AT);
  const Interval planes = queries_of_range(0, place.plane, place.plane, region.length[0]);
  const Interval span = queries_of_range(1, place.row, place.last_row(region), region.length[1]);
  const Rows list{planes.start, planes.end - planes.start, span.start, span.end - span.start};
  const int tile_column = place.tile * TILE_COLUMNS;

  unsigned key[GROUPS][2 * D_STEPS], value[GROUPS][2 * V_STEPS];
  float dk_acc[GROUPS][D_STEPS][4] = {}, dv_acc[GROUPS][V_STEPS][4] = {};
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    const int at = tile_column + g * GROUP_COLUMNS + lane % 8 / BAND + KEY_PAD;
    const int slot = (place.plane - region.key_planes.start) * KEY_RING +
                     step.keys.of(smaller(place.row + lane % 8 % BAND, place.last_row(region)));
    load_group<D_STEPS>(key[g], base + K_AT + slot * K_ROW + at * D_TOKEN, lane);
    load_group<V_STEPS>(value[g], base + V_AT + slot * V_ROW + at * V_TOKEN, lane);
  }

#pragma unroll 1
  for (int first = 0; first < list.count(); first += BLOCK_ROWS) {
    int slot[2];
    slots_of(slot, list, first, region.query_planes.start, step.queries, lane);
    const unsigned query_block = base + Q_AT + block_row<Q_ROW, D_TOKEN>(slot, 3, 4, lane);
    const unsigned query_block_t = base + Q_AT + block_row<Q_ROW, D_TOKEN>(slot, 4, 3, lane);
    const unsigned gradient_block = base + G_AT + block_row<G_ROW, V_TOKEN>(slot, 3, 4, lane);
    const unsigned gradient_block_t = base + G_AT + block_row<G_ROW, V_TOKEN>(slot, 4, 3, lane);
    const float* bias[2][2];
    const float2* scalars[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (h >= ROW_HALVES) {
        scalars[h] = scalars[0] + 1;
        bias[0][h] = bias[0][0], bias[1][h] = bias[1][0];
        continue;
      }
      int plane, row;
      const int i = first + lane / 4 + 8 * h;
      list.at(i, plane, row);
      const int at = (plane - region.query_planes.start) * QUERY_RING + step.queries.of(row);
      scalars[h] = reinterpret_cast<const float2*>(shared + SCALARS_AT) + at * QUERY_COLUMNS;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int table_at = MASKED_ROW;
        const int token = lane % 4 * 2 + e;
        if (i < list.count()) table_at = table_row(region, plane, row, place.plane, place.row + token % BAND);
        bias[e][h] = table + table_at * TABLE_ROW + token / BAND + tile_column;
      }
    }

    struct Queries : Block {
      float lse[4], minus_delta[1][4];
    };
    Queries blocks[2];
    const auto load = [&](Queries& block, int at, const bool (&active)[GROUPS]) {
      block.load(query_block + at * D_TOKEN, gradient_block + at * V_TOKEN);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 pair = scalars[h][at];
        const int column = column_table[at + (ROW_HALVES == 2 ? 0 : h)];
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
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const Interval needed = columns_needed<false>(region, tile_column + g * GROUP_COLUMNS);
      const int start = left + g * GROUP_COLUMNS, end = start + KEY_BLOCKS * BLOCK_COLUMNS;
      bool only[GROUPS];
#pragma unroll
      for (int i = 0; i < GROUPS; ++i) only[i] = i == g;
      ExtraColumns extra(start, end, needed.start + QUERY_PAD, needed.end + QUERY_PAD);
#pragma unroll 1
      for (int c; extra.next(c);) {
        load(blocks[0], c, only);
        blocks[0].multiply(key, value, blocks[0].minus_delta, only);
        differentiate(blocks[0], only);
        finish(blocks[0], c, only);
      }
    }
#endif
  }

  unsigned char* stage = shared + STAGE_AT + threadIdx.x / 32 * STAGE;
  const int rows = region.length[1] - place.row, columns = region.length[2] - region.first[2] - tile_column;
  if (dk != nullptr) {
    Element* target = shifted(dk, dk_layout, place.plane, place.row, region.first[2] + tile_column);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
      store_group<HEAD_DIM>(target, dk_layout, dk_acc[g], scales.result, stage, rows, g * GROUP_COLUMNS, columns, lane);
  }
  if (dv != nullptr) {
    Element* target = shifted(dv, dv_layout, place.plane, place.row, region.first[2] + tile_column);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
      store_group<HEAD_DIM_V>(target, dv_layout, dv_acc[g], 1.f, stage, rows, g * GROUP_COLUMNS, columns, lane);
  }
}
