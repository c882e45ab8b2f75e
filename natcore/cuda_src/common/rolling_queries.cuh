// What warps do for a group of queries once all keys' warps have left dS: dQ.
#pragma once

#include "common/block_products.cuh"
#include "common/rolling.cuh"

// What a lane of a job looks up: where its chunk lane % 4 of token lane / 4 of dQ lies, from the band's first row on,
// or -1; and where it finds what it reads, from its row of keys on and among its query's dS.
struct alignas(16) QueryJob {
  int to, key, weights, unused;

  __device__ __forceinline__ QueryJob(const Layout& s, const Share& share, int group, int lane) {
    const int row = lane / 4 % BAND, column = group * GROUP_COLUMNS + lane / 4 / BAND;
    to = column < share.length[1] && lane % 4 < HEAD_DIM / 8 ? s.of(row, column) + lane % 4 * 8 : -1;
    const int first = smaller(group * GROUP_COLUMNS, share.length[1] - 1);
    const int seen = (keys_of(window_of(1), first, share.length[1]).start + SHIFT) / BLOCK_COLUMNS;
    const int pair = smaller(seen, PAIRS - SEEN_PAIRS);
    key = pair * BLOCK_COLUMNS * TOKEN + ((lane / 16 * TOKEN + lane / 8 % 2 * 16) ^ lane % 8 * 16);
    weights = (pair + lane / 16) * 32 + lane / 8 % 2 * 16;
    unused = 0;
  }
  // The place of its query's dS of its j-th pair: these wrap around.
  __device__ __forceinline__ int weights_of(int j, int lane) const {
    return ((weights + j * 32) & (WEIGHTS_TOKEN - 16)) ^ lane % 8 * 16;
  }
};

// dQ of a group of queries, of which the map has `rows` rows: sums over the pairs that it sees. `key` is where this
// lane's row of keys lies, `weights` where the group's dS does, `to` where the band's first row does.
__device__ __forceinline__ void find_queries(const QueryJob& job, Element* to, int rows, unsigned key, unsigned weights,
                                             unsigned char* stage, float scale, int lane) {
  key += job.key, weights += lane % 8 * WEIGHTS_TOKEN;
  const unsigned keys[STEPS] = {key, key ^ 32};
  // All loads before the first product, and two sums, so that latencies do not add up.
  unsigned block[SEEN_PAIRS][STEPS][4], b[(SEEN_PAIRS + 1) / 2][4];
#pragma unroll
  for (int j = 0; j < SEEN_PAIRS; ++j) {
    if (j % 2 == 0) ldmatrix_x4(b[j / 2], weights + job.weights_of(j, lane));
    load_transposed(block[j], keys, j * BLOCK_COLUMNS * TOKEN);
  }
  float dq[2][STEPS][4] = {};
#pragma unroll
  for (int j = 0; j < SEEN_PAIRS; ++j) {
    const unsigned of_pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
    multiply_transposed<Element>(dq[j % 2], block[j], of_pair);
  }
  unsigned r[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const float(&even)[4] = dq[0][c / 2], (&odd)[4] = dq[1][c / 2];
    const int i = c % 2 * 2;
    r[c] = pack<Element>((even[i] + odd[i]) * scale, (even[i + 1] + odd[i + 1]) * scale);
  }
  stage_tokens<true>(stage, r, lane);
  Stores{to + job.to, 0, job.to >= 0 && lane / 4 % BAND < rows, false}.write(stage, lane);
}
