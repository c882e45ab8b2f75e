// Queries stay: dq of a tile of queries, and its share of drpb.
//
//   S^T = K Q^T, dP^T = V dO^T - delta, P = exp(S - lse), dS = P dP, dQ^T += K^T dS^T
#pragma once

#include "common/band_bias.cuh"
#include "common/band_tiles.cuh"

// dq of a tile of queries, and its share of drpb.
__device__ __forceinline__ void query_tile(const Step& step, const Place& place, const Scales& scales,
                                           unsigned char* shared, const int* column_table, BiasSums& sums,
                                           float* sums_table, Element* dq, const Layout& dq_layout, int lane) {
  const Region& region = step.region;
  const unsigned base = shared_address(shared);
  const float* table = reinterpret_cast<const float*>(shared + TABLE_AT);
  const float2* scalars = reinterpret_cast<const float2*>(shared + SCALARS_AT);
  const Interval planes = keys_of_range(0, place.plane, place.plane, region.length[0]);
  const Interval span = keys_of_range(1, place.row, place.last_row(region), region.length[1]);
  const Rows list{planes.start, planes.end - planes.start, span.start, span.end - span.start};
  const int tile_column = place.tile * TILE_COLUMNS;  // within the region

  unsigned query[GROUPS][2 * D_STEPS], gradient[GROUPS][2 * V_STEPS];
  float lse[GROUPS][4], minus_delta[GROUPS][4], acc[GROUPS][D_STEPS][4] = {};
  int variant[GROUPS];
  const int plane_slot = (place.plane - region.query_planes.start) * QUERY_RING;
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    const int first = tile_column + g * GROUP_COLUMNS;
    const int slot = plane_slot + step.queries.of(smaller(place.row + lane % 8 % BAND, place.last_row(region)));
    const int at = first + lane % 8 / BAND + QUERY_PAD;
    load_group<D_STEPS>(query[g], base + Q_AT + slot * Q_ROW + at * D_TOKEN, lane);
    load_group<V_STEPS>(gradient[g], base + G_AT + slot * G_ROW + at * V_TOKEN, lane);
    const int token = lane % 4 * 2, column = first + token / BAND;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = smaller(place.row + (token + e) % BAND, place.last_row(region));
      const float2 pair = scalars[(plane_slot + step.queries.of(row)) * QUERY_COLUMNS + column + QUERY_PAD];
      lse[g][e] = lse[g][e + 2] = pair.x;
      minus_delta[g][e] = minus_delta[g][e + 2] = pair.y;
    }
    variant[g] = column_table[column + QUERY_PAD] - KEY_PAD;
  }

#pragma unroll 1
  for (int first = 0; first < list.count(); first += BLOCK_ROWS) {
    int slot[2];
    slots_of(slot, list, first, region.key_planes.start, step.keys, lane);
    const unsigned key_block = base + K_AT + block_row<K_ROW, D_TOKEN>(slot, 3, 4, lane);
    const unsigned key_block_t = base + K_AT + block_row<K_ROW, D_TOKEN>(slot, 4, 3, lane);
    const unsigned value_block = base + V_AT + block_row<V_ROW, V_TOKEN>(slot, 3, 4, lane);
    const float* bias[2][2];  // of token e and half h
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (h >= ROW_HALVES) {
          bias[e][h] = bias[e][0] + 1;
          continue;
        }
        int plane, row, table_at = MASKED_ROW;
        const int i = first + lane / 4 + 8 * h;
        list.at(i, plane, row);
        if (i < list.count())
          table_at = table_row(region, place.plane, place.row + (lane % 4 * 2 + e) % BAND, plane, row);
        bias[e][h] = table + table_at * TABLE_ROW;
      }
    }
    if (!sums.fits(list, place, first)) {
      sums.flush(sums_table, lane);
      sums.start(list, place, first);
    }

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
    const auto finish = [&](const Block& block, const unsigned (&transposed)[D_STEPS][4], const bool (&active)[GROUPS]) {
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
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const Interval needed = columns_needed<true>(region, tile_column + g * GROUP_COLUMNS);
      const int start = left + g * GROUP_COLUMNS, end = start + QUERY_BLOCKS * BLOCK_COLUMNS;
      bool only[GROUPS];
#pragma unroll
      for (int i = 0; i < GROUPS; ++i) only[i] = i == g;
      ExtraColumns extra(start, end, needed.start + KEY_PAD, needed.end + KEY_PAD);
#pragma unroll 1
      for (int c; extra.next(c);) {
        load(blocks[0], c, only);
        blocks[0].multiply(query, gradient, minus_delta, only);
        unsigned transposed[D_STEPS][4];
        load_transposed(transposed, key_block_t + c * D_TOKEN);
        differentiate(blocks[0], only);
        sums.add(blocks[0].dp[g], c - KEY_PAD - tile_column - g * GROUP_COLUMNS, sums_table, lane);
        finish(blocks[0], transposed, only);
      }
    }
#endif
  }

  if (dq != nullptr) {
    unsigned char* stage = shared + STAGE_AT + threadIdx.x / 32 * STAGE;
    Element* target = shifted(dq, dq_layout, place.plane, place.row, region.first[2] + tile_column);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
      store_group<HEAD_DIM>(target, dq_layout, acc[g], scales.result, stage, region.length[1] - place.row,
                            g * GROUP_COLUMNS, region.length[2] - region.first[2] - tile_column, lane);
  }
}
