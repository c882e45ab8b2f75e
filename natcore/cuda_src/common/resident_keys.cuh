// Phase 2 of the resident backward: dV and dK of pairs of columns; and where dQ goes.
#pragma once

#include "common/resident.cuh"
#include "common/resident_stores.cuh"
#include "ptx/mma.cuh"

// dQ of half a band, from (row, column) on, to `to`, where the map starts.
__device__ __forceinline__ void write_queries(Element* to, const Layout& s, const Share& share, const Queries& dq,
                                              int row, int column, unsigned char* stage, float scale, int lane) {
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    unsigned r[4];
#pragma unroll
    for (int c = 0; c < 4; ++c)
      r[c] = pack<Element>(dq[g][c / 2][c % 2 * 2] * scale, dq[g][c / 2][c % 2 * 2 + 1] * scale);
    stage_tokens<true>(stage + g * 8 * TOKEN, r, lane);
  }
  const int y = row + lane / 4 % BAND, x = column + lane / 4 / BAND;
  const bool has = lane % 4 < HEAD_DIM / 8 && y < share.length[0];
  const Stores its{to + s.of(y, x) + lane % 4 * 8, GROUP_COLUMNS * s.step[1], has && x < share.length[1],
                   has && x + GROUP_COLUMNS < share.length[1]};
  its.write(stage, lane);
}

// dV or dK of a pair's two columns of keys.
struct KeySums {
  float of[BLOCK_COLUMNS][CHUNKS][4] = {};

  // Adds weights^T tokens, of 16 queries: a lane names a row of weights in each column, and one of tokens.
  __device__ __forceinline__ void add(unsigned weights, unsigned tokens, int query, int lane) {
    unsigned b[STEPS][4];
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
      ldmatrix_x4_transposed(b[step], tokens + QueryRows::chunk(query, 2 * step + lane / 16));
#pragma unroll
    for (int h = 0; h < BLOCK_COLUMNS; ++h) {
      unsigned a[4];
      ldmatrix_x4(a, weights + h * (WEIGHTS / 2));
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
        Mma<Element>::m16n8k16(of[h][c], a[0], a[1], a[2], a[3], b[c / 2][c % 2 * 2], b[c / 2][c % 2 * 2 + 1],
                               of[h][c]);
    }
  }
};

// Phase 2: dV or dK of a pair, from what the bands have kept of it (`units`: P or dS of the first unit of the phase)
// and their output gradients or queries.
template <int D>
__device__ __forceinline__ void find_keys(Element* to, const Layout& s, const Share& share, int pair, unsigned units,
                                          unsigned queries, unsigned zeros, const int* places, unsigned char* stage,
                                          float factor, int lane) {
  KeySums sums;
  const int count = groups_of(pair), half = lane / 8 % 2, query = lane % 8;
  units += units_before(pair) * UNIT, queries += (first_group(pair) * 8 + query) * TOKEN;
  // Lanes of ldmatrix: of weights, row lane % 16 of a column, of the first or second 8 queries (lane / 16); of tokens,
  // query lane % 8 of the first or second 8, chunk lane / 16. Two groups of a band make 16 queries;
  constexpr int NEXT = GROUPS * 8 * TOKEN;  // from band to band
  int slot = 0;
#pragma unroll 1
  for (; slot + 2 <= count; slot += 2) {
#pragma unroll
    for (int band = 0; band < BANDS; ++band) {
      const int place = places[band * 16 + lane % 16];
      const unsigned weights = place % 2 == 0 ? units + (slot + lane / 16) * UNIT + place : zeros + place - 1;
      sums.add(weights, queries + (slot + half) * 8 * TOKEN + band * NEXT, query, lane);
    }
  }
  // of the last group, if they are odd, two bands do.
  if (slot < count) {
#pragma unroll
    for (int band = 0; band < BANDS; band += 2) {
      const int place = places[band * 16 + lane];
      const unsigned weights = place % 2 == 0 ? units + slot * UNIT + place : zeros + place - 1;
      sums.add(weights, queries + slot * 8 * TOKEN + smaller(band + half, BANDS - 1) * NEXT, query, lane);
    }
  }
  const int column = pair * BLOCK_COLUMNS - SHIFT;
  to += s.of(lane / 4, column) + lane % 4 * 8;
#pragma unroll
  for (int h = 0; h < BLOCK_COLUMNS; ++h) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned r[4];
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c)
        r[c] = pack<Element>(sums.of[h][c][2 * i] * factor, sums.of[h][c][2 * i + 1] * factor);
      stage_tokens<false>(stage + i * 8 * TOKEN, r, lane);
    }
    const bool has = lane % 4 < D / 8 && static_cast<unsigned>(column + h) < static_cast<unsigned>(share.length[1]);
    const Stores its{to + h * s.step[1], 8 * s.step[0], has && lane / 4 < share.length[0],
                     has && lane / 4 + 8 < share.length[0]};
    its.write(stage, lane);
  }
}
