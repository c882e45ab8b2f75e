// Neighbourhood attention, backward, on tensor cores: maps of at most 64 tokens, 16-bit elements.
//
// A warp takes the whole map of a (batch entry, head, dilation group), so that nothing is computed twice: P and dS of
// 16 queries and all keys are formed in registers and go at once into three products. dK and dV of the map stay in
// registers until all queries have been there.
//
//   S^T = K Q^T, dP^T = V dO^T            queries 0-7   8-15   ...      C tiles of S^T are at once A operands of
//   P = exp(S - lse)             keys 0-7    p          p               dV += P^T dO and dK += dS^T Q; transposed in
//   delta = sum of P dP               8-15   p          p               registers, of dQ = dS K.
//   dS = P (dP - delta + d_lse)        ...
//
// Neither out nor a second pass is needed: delta is the sum over keys, which are all there. Results take the place of
// q, k and v in shared memory on their way to 16-byte stores.
//
// drpb: blocks of dS whose tiles are equally far apart are added up (see whole_map.cuh), each lane in places of its
// own, over all maps of a warp; then over a head's warps and over pairs with the same difference; then over blocks by
// sum_drpb: all in a fixed order. (In registers these sums would keep dS there, too, as the compiler puts
// off what nobody waits for.)
//
// Shared memory, bytes: bias and mask (struct Scores); then for each warp, STAGES times K, V, Q, dO, lse and d_lse,
// 2 ROWS (D_PITCH + V_PITCH) + 64 TILES, and 256 DISTANCES of sums. (NAT-Tiny, 7x7: 6784 + WARPS * (STAGES * 13248 +
// 3328) for two heads; 139392 for 8 warps.)
#define ROWS_ARE_QUERIES false
#include "common/whole_scores.cuh"
#include "ptx/math.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"

struct Params {
  Sizes sizes;
  Layout d_out, q, k, v, lse, d_lse, rpb, dq, dk, dv;
};

constexpr int K_AT = 0, V_AT = ROWS * D_PITCH, Q_AT = V_AT + ROWS * V_PITCH, G_AT = Q_AT + ROWS * D_PITCH;
constexpr int LSE_AT = G_AT + ROWS * V_PITCH, D_LSE_AT = LSE_AT + TILES * 32, STAGE = D_LSE_AT + TILES * 32;
constexpr int SCORES = (sizeof(Scores) + 127) / 128 * 128;
constexpr int ENTRIES_1 = 2 * KERNEL_1 - 1, ENTRIES_2 = 2 * KERNEL_2 - 1;
constexpr int ENTRIES = (2 * KERNEL_0 - 1) * ENTRIES_1 * ENTRIES_2;
constexpr int SUMS = DISTANCES * 256, OF_WARP = SUMS + STAGES * STAGE;

// s += (rows of all tiles of `rows`) * (rows of tile n of `columns`)^T: scores of the tile, keys on rows.
template <int D>
__device__ __forceinline__ void score(float (&s)[PAIRS][4], unsigned rows, unsigned columns, int n, int lane) {
  constexpr int CHUNKS = D / 8, STEPS = (CHUNKS + 1) / 2;
#pragma unroll
  for (int c = 0; c < STEPS; c += 2) {
    unsigned column[4];
    load_columns<Rows<D>>(column, columns, n, c, lane);
#pragma unroll
    for (int m = 0; m < PAIRS; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (c + i >= STEPS) continue;
        unsigned a[4];
        load_rows<Rows<D>>(a, rows, 2 * m, smaller(2 * m + 1, TILES - 1), c + i, lane);
        if (2 * (c + i) + 1 < CHUNKS) {
          Mma<Element>::m16n8k16(s[m], a[0], a[1], a[2], a[3], column[2 * i], column[2 * i + 1], s[m]);
        } else {
          Mma<Element>::m16n8k8(s[m], a[0], a[1], column[2 * i], s[m]);
        }
      }
    }
  }
}

// P and dS of the queries of two tiles, pairs of queries of a tile and keys of tile j: C tiles of S^T.
struct Weights {
  unsigned p[2][TILES], ds[2][TILES];
};

// Those of tile n, the first or second of the two, and their share of drpb.
template <int SECOND>
__device__ __forceinline__ void find_weights(Weights& x, float2* sums, int n, const Scores& scores, int head,
                                             const unsigned char* stage, bool has_d_lse, float exponent, int lane) {
  const unsigned at = shared_address(stage);
  float s[PAIRS][4], dp[PAIRS][4] = {};
  const unsigned word = scores.word(n, lane);
#pragma unroll
  for (int j = 0; j < 2 * PAIRS; ++j) {
    const float2 start = j < TILES ? scores.start(head, n, j, word, exponent, lane) : make_float2(0.f, 0.f);
    s[j / 2][j % 2 * 2] = start.x, s[j / 2][j % 2 * 2 + 1] = start.y;
  }
  score<HEAD_DIM>(s, at + K_AT, at + Q_AT, n, lane);
  score<HEAD_DIM_V>(dp, at + V_AT, at + G_AT, n, lane);
  const float2 lse = reinterpret_cast<const float2*>(stage + LSE_AT)[4 * n + lane % 4];
  float2 d_lse = make_float2(0.f, 0.f);
  if (has_d_lse) d_lse = reinterpret_cast<const float2*>(stage + D_LSE_AT)[4 * n + lane % 4];
  float delta[2] = {0.f, 0.f};
#pragma unroll
  for (int j = 0; j < TILES; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float &p = s[j / 2][j % 2 * 2 + e], &its = dp[j / 2][j % 2 * 2 + e];
      p = ex2_approx(__fmaf_rn(p, exponent, -LOG2_E * (e == 0 ? lse.x : lse.y)));
      its *= p;
      delta[e] += its;
    }
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll
    for (int other = 4; other < 32; other *= 2) delta[e] += __shfl_xor_sync(~0u, delta[e], other);
    delta[e] -= e == 0 ? d_lse.x : d_lse.y;
  }
#pragma unroll
  for (int j = 0; j < TILES; ++j) {
    const float(&p)[4] = s[j / 2], (&its)[4] = dp[j / 2];
    const int i = j % 2 * 2;
    const float ds0 = __fmaf_rn(-delta[0], p[i], its[i]), ds1 = __fmaf_rn(-delta[1], p[i + 1], its[i + 1]);
    float2& sum = sums[distance(n, j) * 32 + lane];
    sum = make_float2(sum.x + ds0, sum.y + ds1);
    x.p[SECOND][j] = pack<Element>(p[i], p[i + 1]);
    x.ds[SECOND][j] = pack<Element>(ds0, ds1);
  }
}

// acc += x^T * (rows of the queries of `map`), queries of tiles n and, if BOTH, n + 1: dV and dK, keys on rows.
template <int D, bool BOTH>
__device__ __forceinline__ void add_queries(float (&acc)[PAIRS][D / 8][4], const unsigned (&x)[2][TILES], unsigned map,
                                            int n, int lane) {
#pragma unroll
  for (int c = 0; c < D / 8; c += 4) {
    unsigned r[4][2];
    load_tokens<Rows<D>, BOTH>(r, map, n, c, lane);
#pragma unroll
    for (int j = 0; j < TILES; j += 2) {
      const bool both_keys = j + 1 < TILES;
      const int next = both_keys ? j + 1 : j;
#pragma unroll
      for (int i = c; i < c + 4 && i < D / 8; ++i) {
        float(&a)[4] = acc[j / 2][i];
        if (BOTH) {
          Mma<Element>::m16n8k16(a, x[0][j], both_keys ? x[0][next] : 0, x[1][j], both_keys ? x[1][next] : 0,
                                 r[i - c][0], r[i - c][1], a);
        } else {
          Mma<Element>::m16n8k8(a, x[0][j], both_keys ? x[0][next] : 0, r[i - c][0], a);
        }
      }
    }
  }
}

// dQ of the queries, to their place.
template <bool BOTH>
__device__ __forceinline__ void finish_queries(const unsigned (&ds)[2][TILES], unsigned keys, unsigned char* result,
                                               int n, float scale, int lane) {
  float acc[D_CHUNKS][4] = {};
#pragma unroll
  for (int j = 0; j < TILES; j += 2) {
    const bool both_keys = j + 1 < TILES;
    const int next = both_keys ? j + 1 : j;
    unsigned a[4];
    a[0] = movmatrix_transposed(ds[0][j]);
    a[1] = BOTH ? movmatrix_transposed(ds[1][j]) : 0;
    a[2] = both_keys ? movmatrix_transposed(ds[0][next]) : 0;
    a[3] = both_keys && BOTH ? movmatrix_transposed(ds[1][next]) : 0;
#pragma unroll
    for (int c = 0; c < D_CHUNKS; c += 4) {
      unsigned r[4][2];
      load_tokens<Rows<HEAD_DIM>>(r, keys, j, c, lane);
#pragma unroll
      for (int i = c; i < c + 4 && i < D_CHUNKS; ++i) {
        if (both_keys) {
          Mma<Element>::m16n8k16(acc[i], a[0], a[1], a[2], a[3], r[i - c][0], r[i - c][1], acc[i]);
        } else {
          Mma<Element>::m16n8k8(acc[i], a[0], a[1], r[i - c][0], acc[i]);
        }
      }
    }
  }
  __syncwarp();  // all lanes have read these queries
  if (!writes(lane)) return;
#pragma unroll
  for (int h = 0; h < (BOTH ? 2 : 1); ++h)
#pragma unroll
    for (int i = 0; i < D_CHUNKS; ++i)
      write_pair<HEAD_DIM>(result, n + h, i, acc[i][2 * h] * scale, acc[i][2 * h + 1] * scale, lane);
}

// dK or dV, to `result`.
template <int D>
__device__ __forceinline__ void finish_keys(const float (&acc)[PAIRS][D / 8][4], unsigned char* result, float factor,
                                            int lane) {
  if (!writes(lane)) return;
#pragma unroll
  for (int j = 0; j < TILES; ++j)
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
      write_pair<D>(result, j, i, acc[j / 2][i][j % 2 * 2] * factor, acc[j / 2][i][j % 2 * 2 + 1] * factor, lane);
}

// The sum of an entry of drpb over a head's warps, whose `sums` lie OF_WARP bytes apart: [distance][key][query].
__device__ __forceinline__ float sum_of_entry(const unsigned char* sums, int entry) {
  const int difference[3] = {entry / (ENTRIES_1 * ENTRIES_2) - KERNEL_0 + 1,
                             entry / ENTRIES_2 % ENTRIES_1 - KERNEL_1 + 1, entry % ENTRIES_2 - KERNEL_2 + 1};
  float sum = 0.f;
#pragma unroll
  for (int query = 0; query < 8; ++query) {
    int tiles[3], key = 0;
    bool exists = true;
#pragma unroll
    for (int a = 0; a < 3; ++a) {
      const int at = token_at(a, query) + difference[a] + tiles_of(a) * tile_of(a);  // positive where it exists
      tiles[a] = at / tile_of(a) - tiles_of(a);
      exists &= at >= tile_of(a) && tiles[a] < tiles_of(a);
      key = key * tile_of(a) + at % tile_of(a);
    }
    if (!exists) continue;
    const int at = distance_number(tiles[0], tiles[1], tiles[2]) * 64 + key * 8 + query;
#pragma unroll
    for (int w = 0; w < AT_ONCE; ++w) sum += reinterpret_cast<const float*>(sums + w * HEADS * OF_WARP)[at];
  }
  return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    whole_backward(const Element* __restrict__ d_out,    // [batch, x0, x1, x2, heads, HEAD_DIM_V]
                   const Element* __restrict__ q,        // [batch, x0, x1, x2, heads, HEAD_DIM]
                   const Element* __restrict__ k,        // [batch, x0, x1, x2, heads, HEAD_DIM]
                   const Element* __restrict__ v,        // [batch, x0, x1, x2, heads, HEAD_DIM_V]
                   const float* __restrict__ lse,        // [batch, x0, x1, x2, heads]
                   const float* __restrict__ d_lse,      // [batch, x0, x1, x2, heads], or null: zeros
                   const BiasElement* __restrict__ rpb,  // [heads, 2 k0 - 1, 2 k1 - 1, 2 k2 - 1]
                   Element* __restrict__ dq, Element* __restrict__ dk, Element* __restrict__ dv,  // or null
                   float* __restrict__ drpb_partials,  // [slices, groups, heads, 2 k0 - 1, 2 k1 - 1, 2 k2 - 1], or null
                   const float scale, const __grid_constant__ Params params) {
  extern __shared__ __align__(128) unsigned char shared[];
  Scores& scores = *reinterpret_cast<Scores*>(shared);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), its_lane = threadIdx.x % 32;
  unsigned char* stages = shared + SCORES + warp * OF_WARP;
  const Share share(params.sizes, warp);
  const float unit = unit_of(scale);

  const int step = params.sizes.slices * AT_ONCE, first = share.slice * AT_ONCE + warp / HEADS;
  const auto load = [&](int entry, int slot) {
    if (entry < params.sizes.batch) {
      const int lane = anew(its_lane);
      const unsigned stage = shared_address(stages) + slot * STAGE;
      load_map<HEAD_DIM>(stage + K_AT, share.base(k, params.k, share.head, entry), params.k, share, lane);
      load_map<HEAD_DIM>(stage + Q_AT, share.base(q, params.q, share.head, entry), params.q, share, lane);
      load_map<HEAD_DIM_V>(stage + V_AT, share.base(v, params.v, share.head, entry), params.v, share, lane);
      load_map<HEAD_DIM_V>(stage + G_AT, share.base(d_out, params.d_out, share.head, entry), params.d_out, share,
                           lane);
      load_scalars(stage + LSE_AT, share.base(lse, params.lse, share.head, entry), params.lse, share, lane);
      if (d_lse != nullptr)
        load_scalars(stage + D_LSE_AT, share.base(d_lse, params.d_lse, share.head, entry), params.d_lse, share, lane);
    }
    cp_async_commit();
  };
  const BiasShare<AT_ONCE> bias(rpb + static_cast<long long>(share.head) * params.rpb.head, params.rpb, warp, its_lane);
  for (int i = its_lane; i < SUMS / 16; i += 32)
    reinterpret_cast<uint4*>(stages + STAGES * STAGE)[i] = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int slot = 0; slot < STAGES; ++slot) {
    clear_last<HEAD_DIM>(stages + slot * STAGE + K_AT, its_lane);
    clear_last<HEAD_DIM_V>(stages + slot * STAGE + V_AT, its_lane);
    clear_last<HEAD_DIM>(stages + slot * STAGE + Q_AT, its_lane);
    clear_last<HEAD_DIM_V>(stages + slot * STAGE + G_AT, its_lane);
  }
  __syncwarp();
  // What is asked for first is there first: warps of one batch entry after another, so that the first ones compute
  // while the others' maps are under way.
  const int turn = warp / HEADS;
  if (turn > 0) named_barrier_sync(turn, 64 * HEADS);
#pragma unroll
  for (int slot = 0; slot < STAGES; ++slot) load(first + slot * step, slot);
  if (turn + 1 < AT_ONCE) named_barrier_sync(turn + 1, 64 * HEADS);
  scores.fill(bias, 1.f / unit, share, warp, its_lane);
  __syncthreads();

  float2* sums = reinterpret_cast<float2*>(stages + STAGES * STAGE);
  int slot = 0;
#pragma unroll 1
  for (int entry = first; entry < params.sizes.batch; entry += step) {
    cp_async_wait<STAGES - 1>();
    __syncwarp();
    unsigned char* stage = stages + slot * STAGE;
    const unsigned at = shared_address(stage);
    const int lane = anew(its_lane);
    float dk_acc[PAIRS][D_CHUNKS][4] = {}, dv_acc[PAIRS][V_CHUNKS][4] = {};
#pragma unroll 1
    for (int n = 0; n + 1 < TILES; n += 2) {
      Weights x;
      find_weights<0>(x, sums, n, scores, warp % HEADS, stage, d_lse != nullptr, unit * LOG2_E, lane);
      find_weights<1>(x, sums, n + 1, scores, warp % HEADS, stage, d_lse != nullptr, unit * LOG2_E, lane);
      add_queries<HEAD_DIM_V, true>(dv_acc, x.p, at + G_AT, n, lane);
      add_queries<HEAD_DIM, true>(dk_acc, x.ds, at + Q_AT, n, lane);
      finish_queries<true>(x.ds, at + K_AT, stage + Q_AT, n, scale, lane);
    }
    if (TILES % 2 == 1) {
      constexpr int n = TILES - 1;
      Weights x;
      find_weights<0>(x, sums, n, scores, warp % HEADS, stage, d_lse != nullptr, unit * LOG2_E, lane);
      add_queries<HEAD_DIM_V, false>(dv_acc, x.p, at + G_AT, n, lane);
      add_queries<HEAD_DIM, false>(dk_acc, x.ds, at + Q_AT, n, lane);
      finish_queries<false>(x.ds, at + K_AT, stage + Q_AT, n, scale, lane);
    }
    __syncwarp();
    finish_keys<HEAD_DIM_V>(dv_acc, stage + V_AT, 1.f, lane);
    finish_keys<HEAD_DIM>(dk_acc, stage + K_AT, scale, lane);
    __syncwarp();
    if (dq != nullptr)
      store_map<HEAD_DIM>(share.base(dq, params.dq, share.head, entry), stage + Q_AT, params.dq, share, lane);
    if (dk != nullptr)
      store_map<HEAD_DIM>(share.base(dk, params.dk, share.head, entry), stage + K_AT, params.dk, share, lane);
    if (dv != nullptr)
      store_map<HEAD_DIM_V>(share.base(dv, params.dv, share.head, entry), stage + V_AT, params.dv, share, lane);
    __syncwarp();
    load(entry + STAGES * step, slot);
    slot = slot + 1 == STAGES ? 0 : slot + 1;
  }

  if (drpb_partials == nullptr) return;
  __syncthreads();
  float* partials = drpb_partials + static_cast<long long>(share.number) * params.sizes.heads * ENTRIES;
  const int first_head = share.head - warp % HEADS;
  for (int i = threadIdx.x; i < HEADS * ENTRIES; i += THREADS) {
    const unsigned char* of_head = shared + SCORES + i / ENTRIES * OF_WARP + STAGES * STAGE;
    partials[first_head * ENTRIES + i] = sum_of_entry(of_head, i % ENTRIES);
  }
}
