// What a warp does for its pair of columns of keys: P and dS of a band, sums of drpb, dK and dV.
#pragma once

#include "common/block_products.cuh"
#include "common/rolling.cuh"
#include "ptx/math.cuh"

// dS to where queries' jobs find it, matrices of 8 slots x 8 queries: of the first one's, where a lane names a query or
// stores a pair, from its band's start.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ int weights_place_of(int first, int pair, int lane) {
  return lane / 16 * 8 * WEIGHTS_TOKEN + weights_place(lane % 8 / 4, first + lane % 4, pair, lane / 8 % 2);
}
__device__ __forceinline__ void keep(unsigned char* shared, int at, const unsigned (&r)[4]) {
  stmatrix_x4_transposed(shared_address(shared) + at, r);
}
__device__ __forceinline__ void keep(unsigned char* shared, int at, const unsigned (&r)[2]) {
  stmatrix_x2_transposed(shared_address(shared) + at, r);
}
#else
__device__ __forceinline__ int weights_place_of(int first, int pair, int lane) {
  return weights_place(lane / 4 / 4, first + lane / 4 % 4, pair, 0) + lane % 4 * 4;
}
template <int COUNT>
__device__ __forceinline__ void keep(unsigned char* shared, int at, const unsigned (&r)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    *reinterpret_cast<unsigned*>(shared + (at ^ i % 2 * 16) + i / 2 * 8 * WEIGHTS_TOKEN) = movmatrix_transposed(r[i]);
}
#endif

// Where a lane finds what its warp reads of a band, in the shared window but for bias and scalars.
struct Places {
  unsigned key[STEPS];     // values lie as far from keys everywhere
  unsigned query, tokens;  // of the first group: as an operand of S; of the first two, as one of dK. So do gradients
  unsigned char* shared;
  int weights;  // of the first group, from there on
  const float* bias;
  const Scalars* scalars;
};

// Sums of dS: of each group those of a lane's keys of both columns with its two queries. Bands of one map and
// of the next hand them on from slot to slot, so that a lane always has the same difference of rows modulo 8: those
// from OFFSET on, or RARE ones, which bands near the first and the last row have, in shared memory.
struct Sums {
  float of[MOST_GROUPS][4] = {};
};
struct Differences {
  float* rare;   // this lane's place there; null in bands that have none
  bool is_rare;  // this lane's
};

struct KeySums {
  float dk[CHUNKS][4] = {}, dv[CHUNKS][4] = {};

  // One unit: groups [FIRST, FIRST + COUNT) of the pair's. Of the last one, others are told when dS is there.
  template <int FIRST, int COUNT>
  __device__ __forceinline__ void add(const Places& at, Sums& sums, const Differences& differences, float unit,
                                      const Step& step, bool is_last, int lane) {
    unsigned block[STEPS][4], vectors[COUNT][2 * STEPS];
    float p[COUNT][4], ds[COUNT][4];
    load_block(block, at.key, 0);
#pragma unroll
    for (int g = 0; g < COUNT; ++g) {
      ldmatrix_x4(vectors[g], at.query + (FIRST + g) * 8 * TOKEN);
#pragma unroll
      for (int h = 0; h < BLOCK_COLUMNS; ++h) {
        const float2 bias = *reinterpret_cast<const float2*>(at.bias + h * TABLE_COLUMNS + (FIRST + g) * GROUP_COLUMNS);
        p[g][2 * h] = bias.x, p[g][2 * h + 1] = bias.y;
      }
      multiply<Element>(p[g], block, vectors[g], p[g]);
    }
    load_block(block, at.key, V_AT - K_AT);
#pragma unroll
    for (int g = 0; g < COUNT; ++g) {
      ldmatrix_x4(vectors[g], at.query + (FIRST + g) * 8 * TOKEN + G_AT - Q_AT);
      const Scalars its = at.scalars[(FIRST + g) * GROUP_COLUMNS];
#pragma unroll
      for (int i = 0; i < 4; ++i) ds[g][i] = its.start[i % 2];
      multiply<Element>(ds[g], block, vectors[g], ds[g]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[g][i] = ex2_approx(__fmaf_rn(p[g][i], unit, -its.lse[i % 2]));
        ds[g][i] *= p[g][i];
      }
    }
    unsigned weights[2 * COUNT], kept[2 * COUNT];
#pragma unroll
    for (int i = 0; i < 2 * COUNT; ++i) {
      weights[i] = pack<Element>(p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1]);
      kept[i] = pack<Element>(ds[i / 2][i % 2 * 2], ds[i / 2][i % 2 * 2 + 1]);
    }
    keep(at.shared, at.weights + FIRST * 8 * WEIGHTS_TOKEN, kept);
    if (is_last) step.arrive(lane);
#ifdef RPB
#pragma unroll
    for (int i = 0; i < 4 * COUNT; ++i) {
      float& sum = sums.of[FIRST + i / 4][i % 4];
      sum = __shfl_sync(~0u, sum, lane - 8);
      if (!differences.is_rare) sum += ds[i / 4][i % 4];
    }
    if (differences.rare != nullptr && differences.is_rare)
#pragma unroll
      for (int i = 0; i < 4 * COUNT; ++i) differences.rare[(FIRST * 4 + i) * 32] += ds[i / 4][i % 4];
#endif
    add_products<FIRST>(dv, at, G_AT - Q_AT, weights);
    add_products<FIRST>(dk, at, 0, kept);
  }

  // Adds weights^T tokens, of 16 or 8 queries.
  template <int FIRST>
  static __device__ __forceinline__ void add_products(float (&sums)[CHUNKS][4], const Places& at, int tokens,
                                                      const unsigned (&a)[4]) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      unsigned b[4];
      ldmatrix_x4_transposed(b, ((at.tokens + tokens + FIRST * 8 * TOKEN) ^ step * 32));
#pragma unroll
      for (int c = 0; c < 2; ++c)
        Mma<Element>::m16n8k16(sums[2 * step + c], a[0], a[1], a[2], a[3], b[2 * c], b[2 * c + 1], sums[2 * step + c]);
    }
  }
  template <int FIRST>
  static __device__ __forceinline__ void add_products(float (&sums)[CHUNKS][4], const Places& at, int tokens,
                                                      const unsigned (&a)[2]) {
    unsigned b[4];
    ldmatrix_x4_transposed(b, at.query + tokens + FIRST * 8 * TOKEN);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) Mma<Element>::m16n8k8(sums[c], a[0], a[1], b[c], sums[c]);
  }

  // To the stage, what `rows` rows of keys have, 2 at most, from that with slot `slot` on, whose slots others get:
  // tokens of dV, then of dK, by columns; a token's words in the order of lanes % 4.
  __device__ __forceinline__ void stage(unsigned char* stage, int slot, int rows, float scale, int lane) {
    const int row = (lane / 4 - slot) & (BLOCK_ROWS - 1);
    if (row >= rows) return;
    unsigned char* to = stage + row * TOKEN + lane % 4 * 16;
#pragma unroll
    for (int h = 0; h < BLOCK_COLUMNS; ++h) {
      unsigned v[CHUNKS], k[CHUNKS];
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        v[c] = pack<Element>(dv[c][2 * h], dv[c][2 * h + 1]);
        k[c] = pack<Element>(dk[c][2 * h] * scale, dk[c][2 * h + 1] * scale);
        dv[c][2 * h] = dv[c][2 * h + 1] = dk[c][2 * h] = dk[c][2 * h + 1] = 0.f;
      }
      *reinterpret_cast<uint4*>(to + h * STAGE_COLUMN) = make_uint4(v[0], v[1], v[2], v[3]);
      *reinterpret_cast<uint4*>(to + (2 + h) * STAGE_COLUMN) = make_uint4(k[0], k[1], k[2], k[3]);
    }
  }
};

// Where a lane puts what it takes from the stage: chunk lane % 4 of token lane / 4, of dV or dK.
struct KeyStores {
  Element* to;  // row 0; null where there is nothing to be put
  int step;     // from row to row

  __device__ __forceinline__ KeyStores(const Layout& of_dk, const Layout& of_dv, const Share& share, Element* dk,
                                       Element* dv, int entry, int pair, int lane) {
    const bool of_values = lane < 16;
    const int column = pair * BLOCK_COLUMNS - SHIFT + lane / 8 % 2, chunks = (of_values ? HEAD_DIM_V : HEAD_DIM) / 8;
    const long long at = of_values ? share.base(dv, of_dv, entry) - dv + column * of_dv.step[1]
                                   : share.base(dk, of_dk, entry) - dk + column * of_dk.step[1];
    to = of_values ? dv : dk, step = of_values ? of_dv.step[0] : of_dk.step[0];
    const bool has = static_cast<unsigned>(column) < static_cast<unsigned>(share.length[1]) && lane % 4 < chunks;
    to = to != nullptr && has ? to + at + lane % 4 * 8 : nullptr;
  }

  // Rows [row, row + rows).
  __device__ __forceinline__ void write(const unsigned char* stage, int row, int rows, int lane) const {
    const unsigned char* from = stage + lane / 8 * STAGE_COLUMN + lane / 4 % 2 * TOKEN;
    const unsigned* its = reinterpret_cast<const unsigned*>(from) + lane % 4;
    if (to == nullptr || lane / 4 % 2 >= rows) return;
    *reinterpret_cast<uint4*>(to + (row + lane / 4 % 2) * step) = make_uint4(its[0], its[4], its[8], its[12]);
  }
};
