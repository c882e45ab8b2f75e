// Phase 1 of the resident backward: P and dS of half a band, its dQ, and the scalars that they need.
#pragma once

#include "common/block_products.cuh"
#include "common/resident.cuh"
#include "ptx/math.cuh"

// Scalars of half a band's queries, by pairs of a lane (the two queries 2 n and 2 n + 1 of a group): what dP starts
// from, and log2(e) lse.
struct Scalars {
  float2 start[2][4], lse[2][4];  // start: d_lse - delta
};
static_assert(sizeof(Scalars) == SCALARS, "");

// Starts the copies of lse and d_lse of half a band's queries, from (row, column) on, to where the scalars will be,
// such that tokens that the map lacks get a weight of exp(-inf). `lse` and `d_lse`, if any, are where the map starts.
__device__ __forceinline__ void load_scalars(Scalars& scalars, const float* lse, const float* d_lse,
                                             const Layout& of_lse, const Layout& of_d_lse, const Share& share,
                                             int row, int column, int lane) {
  if (lane >= 16) return;
  const int y = row + lane % BAND, x = column + lane / BAND;
  float* its_start = reinterpret_cast<float*>(scalars.start) + lane;
  float* its_lse = reinterpret_cast<float*>(scalars.lse) + lane;
  const bool has = share.has(y, x);
  if (has && d_lse != nullptr) {
    cp_async_small<4>(shared_address(its_start), d_lse + of_d_lse.of(y, x), true);
  } else {
    *its_start = 0.f;
  }
  if (has) {
    cp_async_small<4>(shared_address(its_lse), lse + of_lse.of(y, x), true);
  } else {
    *its_lse = __int_as_float(0x7f800000);
  }
}

// The scalars, from lse and d_lse, which lie there, and these queries' output gradients and outputs.
__device__ __forceinline__ void find_scalars(Scalars& scalars, const unsigned char* gradients,
                                             const unsigned char* outputs, int groups, int lane) {
  float delta = 0.f;
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    if (g >= groups) continue;
    const int at = (g * 8 + lane / 4) * TOKEN + QueryRows::chunk(lane / 4, lane % 4);
    const uint4 a = *reinterpret_cast<const uint4*>(gradients + at), b = *reinterpret_cast<const uint4*>(outputs + at);
    float c[4] = {};  // the diagonal of a product, in the lanes of which lane % 4 is half of the token
    Mma<Element>::m16n8k16(c, a.x, 0, a.y, 0, b.x, b.y, c);
    Mma<Element>::m16n8k16(c, a.z, 0, a.w, 0, b.z, b.w, c);
    const float its = __shfl_sync(~0u, lane / 4 % 2 == 0 ? c[0] : c[1], lane % 8 * 4 + lane % 8 / 2);
    if (lane / 8 == g) delta = its;
  }
  if (lane < 16) {
    reinterpret_cast<float*>(scalars.start)[lane] -= delta;
    reinterpret_cast<float*>(scalars.lse)[lane] *= LOG2_E;
  }
  __syncwarp();
}

// Where a lane finds what its products of phase 1 read, in the shared window but for bias and scalars.
struct Places {
  unsigned key[STEPS], key_t[STEPS];  // of pair 0; values lie as far from keys everywhere
  unsigned query;                     // of the first group; so do output gradients
  unsigned char* units;               // where the first unit is kept
  const float* bias[2];
  const Scalars& scalars;
};

// P and dS of a unit to where they are kept: matrices of 8 keys x 8 queries, of which a lane names a row or stores a
// pair. `unit` is OF_LANE bytes further for each lane.
#if __CUDA_ARCH__ >= 900
constexpr int OF_LANE = 16;
__device__ __forceinline__ void keep(unsigned char* unit, const unsigned (&r)[4]) {
  stmatrix_x4(shared_address(unit), r);
}
#else
constexpr int OF_LANE = 4;
__device__ __forceinline__ void keep(unsigned char* unit, const unsigned (&r)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) *reinterpret_cast<unsigned*>(unit + i * 128) = r[i];
}
#endif


// Phase 1 of half a band: its units of the phase's pairs. The phase is known when compiling.
template <int HALF>
__device__ __forceinline__ void find_weights(int phase, Queries& dq, Sums& sums, const Places& at, unsigned lacks,
                                             float unit, int lane) {
  const unsigned mask = unit < 0.f ? 0x7f7fu : 0xff7fu;  // -3e38 times the unit's sign
  unsigned query[2][2 * STEPS], gradient[2][2 * STEPS];
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    if (2 * HALF + g >= GROUPS) continue;
    ldmatrix_x4(query[g], at.query + g * 8 * TOKEN);
    ldmatrix_x4(gradient[g], at.query + g * 8 * TOKEN + G_AT - Q_AT);
  }
#pragma unroll
  for (int of = 0; of < AT_ONCE; ++of) {
    const int pair = phase * AT_ONCE + of;
    if (pair >= PAIRS || !(is_unit(2 * HALF, pair) || is_unit(2 * HALF + 1, pair))) continue;
    const int offset = pair * BLOCK_COLUMNS * TOKEN;
    // Step by step for both groups, so that one's latency hides behind the other's.
    float p[2][4], ds[2][4];
    unsigned block[STEPS][4];
    load_block(block, at.key, offset);
    // A product in bfloat16, [key in column] * [query lacks column] * -3e38, masks columns. All are in one part of k.
    const bool its = lane % 4 == pair % 4;
    const unsigned in_column[2] = {its ? 0x3f80u : 0u, its ? 0x3f800000u : 0u};
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      if (!is_unit(2 * HALF + g, pair)) continue;
      const int distance = pair - GROUP_PAIRS * (2 * HALF + g);
#pragma unroll
      for (int i = 0; i < 4; ++i) p[g][i] = at.bias[i % 2][distance * BLOCK_COLUMNS + i / 2];
      Mma<bfloat16>::m16n8k8(p[g], in_column[0], in_column[1], (lacks >> (2 * g + pair / 4) & 0x10001u) * mask, p[g]);
      multiply<Element>(p[g], block, query[g], p[g]);
    }
    load_block(block, at.key, offset + V_AT);
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      if (!is_unit(2 * HALF + g, pair)) continue;
      const float2 start = at.scalars.start[g][lane % 4];
      ds[g][0] = ds[g][2] = start.x, ds[g][1] = ds[g][3] = start.y;
      multiply<Element>(ds[g], block, gradient[g], ds[g]);
    }
    load_transposed(block, at.key_t, offset);
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const int group = 2 * HALF + g;
      if (!is_unit(group, pair)) continue;
      const float2 lse = at.scalars.lse[g][lane % 4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[g][i] = ex2_approx(__fmaf_rn(p[g][i], unit, -(i % 2 == 0 ? lse.x : lse.y)));
        ds[g][i] *= p[g][i];
#ifdef RPB
        sums[pair - GROUP_PAIRS * group - LEAST][i] += ds[g][i];
#endif
      }
      const unsigned kept[4] = {pack<Element>(p[g][0], p[g][1]), pack<Element>(p[g][2], p[g][3]),
                                pack<Element>(ds[g][0], ds[g][1]), pack<Element>(ds[g][2], ds[g][3])};
      keep(at.units + (units_before(pair) + group - first_group(pair)) * UNIT, kept);
      const unsigned operand[2] = {movmatrix_transposed(kept[2]), movmatrix_transposed(kept[3])};
      multiply_transposed<Element>(dq[g], block, operand);
    }
  }
}
