// Tiles of groups: where they lie, their products with blocks, and their results on the way to memory.
#pragma once

#include "common/bands.cuh"

struct Scales {
  float exponent, result;  // S to the exponent of 2; the call's own
};

// A 16 x 8 accumulator as the B operand of a product over its 16 rows.
__device__ __forceinline__ void as_operand(unsigned (&b)[2], const float (&c)[4]) {
  b[0] = movmatrix_transposed(pack<Element>(c[0], c[1]));
  b[1] = movmatrix_transposed(pack<Element>(c[2], c[3]));
}

// One block's operands, and S and dP of the groups that it meets. A unit is the m16n8 tile of one group; its
// element i belongs to half i / 2 of the block and token i % 2 of this lane's pair.
struct Block {
  unsigned d[D_STEPS][4], v[V_STEPS][4];
  float s[GROUPS][4], dp[GROUPS][4];

  __device__ __forceinline__ void load(unsigned d_block, unsigned v_block) {
#pragma unroll
    for (int step = 0; step < D_STEPS; ++step) ldmatrix_x4(d[step], d_block + step * 32);
#pragma unroll
    for (int step = 0; step < V_STEPS; ++step) ldmatrix_x4(v[step], v_block + step * 32);
  }
  // S += D B and dP = minus_delta + V C, where the accumulators of group g start from minus_delta[g] or, if one
  // serves all groups, from minus_delta[0].
  template <int COUNT>
  __device__ __forceinline__ void multiply(const unsigned (&b)[GROUPS][2 * D_STEPS],
                                           const unsigned (&c)[GROUPS][2 * V_STEPS],
                                           const float (&minus_delta)[COUNT][4], const bool (&active)[GROUPS]) {
#pragma unroll
    for (int step = 0; step < D_STEPS; ++step)
#pragma unroll
      for (int g = 0; g < GROUPS; ++g)
        if (active[g])
          Mma<Element>::m16n8k16(s[g], d[step][0], d[step][1], d[step][2], d[step][3], b[g][2 * step],
                                 b[g][2 * step + 1], s[g]);
#pragma unroll
    for (int step = 0; step < V_STEPS; ++step)
#pragma unroll
      for (int g = 0; g < GROUPS; ++g)
        if (active[g]) {
          const float(&start)[4] = minus_delta[COUNT == 1 ? 0 : g], (&sum)[4] = dp[g];
          Mma<Element>::m16n8k16(dp[g], v[step][0], v[step][1], v[step][2], v[step][3], c[g][2 * step],
                                 c[g][2 * step + 1], step == 0 ? start : sum);
        }
  }
};

// Whether a block is loaded while the one before it is worked on; long rows leave no registers for that.
constexpr bool PIPELINED = D_STEPS + V_STEPS <= 4;

template <int STEPS>
__device__ __forceinline__ void load_transposed(unsigned (&a)[STEPS][4], unsigned block) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) ldmatrix_x4_transposed(a[step], block + step * 32);
}

// The transposed product: rows of C are elements of the head, C^T += block^T B.
template <int STEPS>
__device__ __forceinline__ void multiply_transposed(float (&c)[GROUPS][STEPS][4], const unsigned (&a)[STEPS][4],
                                                    const unsigned (&b)[GROUPS][2], const bool (&active)[GROUPS]) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int g = 0; g < GROUPS; ++g)
      if (active[g])
        Mma<Element>::m16n8k16(c[g][step], a[step][0], a[step][1], a[step][2], a[step][3], b[g][0], b[g][1],
                               c[g][step]);
}

// Where lane l's row of the four matrices of a block starts, given the slots of list rows l % 8 (+ 8).
template <int ROW, int TOKEN>
__device__ __forceinline__ unsigned block_row(const int (&slot)[ROW_HALVES], int first, int second, int lane) {
  const int half = lane >> first & 1, chunk = lane >> second & 1;
  return (half == 0 ? slot[0] : slot[ROW_HALVES - 1]) * ROW + (ROW_HALVES == 2 ? 0 : half * TOKEN) + chunk * 16;
}

// The 8 tokens of a group as a B operand, from `row`, the address of token l % 8.
template <int STEPS>
__device__ __forceinline__ void load_group(unsigned (&b)[2 * STEPS], unsigned row, int lane) {
#pragma unroll
  for (int step = 0; step < STEPS; step += 2) {
    if (step + 1 < STEPS) {
      unsigned r[4];
      ldmatrix_x4(r, row + step * 32 + lane / 8 * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) b[2 * step + i] = r[i];
    } else {
      unsigned r[2];
      ldmatrix_x2(r, row + step * 32 + lane / 8 % 2 * 16);
      b[2 * step] = r[0], b[2 * step + 1] = r[1];
    }
  }
}

// Results of a group, D x 8 accumulators, through the warp's stage to memory.
template <int D, int STEPS>
__device__ __forceinline__ void store_group(Element* target, const Layout& s, const float (&c)[STEPS][4], float factor,
                                            unsigned char* stage, int height, int width, int lane) {
  __syncwarp();
  unsigned r[STEPS][2];
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int h = 0; h < 2; ++h) r[step][h] = pack<Element>(c[step][2 * h] * factor, c[step][2 * h + 1] * factor);
#if __CUDA_ARCH__ >= 900
  const unsigned address = shared_address(stage) + lane % 8 * STAGE_ROW + lane / 8 * 16;
#pragma unroll
  for (int step = 0; step < STEPS; step += 2) {
    if (step + 1 < STEPS)
      stmatrix_x4_transposed(address + step * 32, {r[step][0], r[step][1], r[step + 1][0], r[step + 1][1]});
    else
      stmatrix_x2_transposed(address + step * 32, r[step]);  // lanes 16 to 31 give no address
  }
#else
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<unsigned*>(stage + lane / 4 * STAGE_ROW + step * 32 + h * 16 + lane % 4 * 4) =
          movmatrix_transposed(r[step][h]);
#endif
  __syncwarp();
  constexpr int CHUNKS = D / 8;
#pragma unroll
  for (int at = 0; at < 8 * CHUNKS; at += 32) {
    // Tokens n and n + 4 together, where 8 lanes read two: they miss each other's banks.
    const int i = at + lane, n = i / CHUNKS, token = CHUNKS == 4 ? n / 2 + n % 2 * 4 : n, chunk = i % CHUNKS;
    const int y = token % BAND, x = token / BAND;
    if ((at + 32 <= 8 * CHUNKS || i < 8 * CHUNKS) && y < height && x < width)
      *reinterpret_cast<uint4*>(target + distance(s, 0, y, x) + chunk * 8) =
          *reinterpret_cast<const uint4*>(stage + token * STAGE_ROW + chunk * 16);
  }
}

// Results of a tile, given where the region's lie.
template <int D, int STEPS, typename Bands>
__device__ __forceinline__ void store_tile(Element* result, long long region, const Layout& s, const Step& step,
                                           const Bands& bands, int item, unsigned char* shared,
                                           const float (&c)[GROUPS][STEPS][4], float factor) {
  const int b = item / TILES, column = item % TILES * TILE_COLUMNS, lane = lane_here();
  const int plane = b / (REGION_1 / BAND), row = b % (REGION_1 / BAND) * BAND;
  Element* target = result + region + distance(s, plane, row, column);
#pragma unroll
  for (int g = 0; g < GROUPS; ++g)
    store_group<D>(target + distance(s, 0, 0, g * GROUP_COLUMNS), s, c[g], factor,
                   shared + STAGE_AT + warp_here() * STAGE, bands[b].height, step.width - column - g * GROUP_COLUMNS,
                   lane);
}
