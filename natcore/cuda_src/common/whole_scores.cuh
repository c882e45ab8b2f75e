// Bias and mask of whole maps: what S starts from, divided by the unit in which S is computed.
//
// The bias of a block of scores depends on the distance of its two tiles alone. It lies in shared memory in the order
// of lanes, two floats a lane and distance. FULL maps need no other mask: what an axis of one tile lacks are the same
// tokens of every tile, and the bias masks them. Other maps have a word of bits for each tile of queries
// and lane: bit 2 j + e says whether the lane's pair e of tile j of keys counts.
//
// ROWS_ARE_QUERIES says which lane has which pair (e = 0, 1), as in the C tile of S = Q K^T or of S^T = K Q^T.
#pragma once

#include "common/scale.cuh"
#include "common/whole_map.cuh"

// Tokens of a lane's pair e in their tiles.
__device__ __forceinline__ int query_of(int lane, int e) { return ROWS_ARE_QUERIES ? lane / 4 : lane % 4 * 2 + e; }
__device__ __forceinline__ int key_of(int lane, int e) { return ROWS_ARE_QUERIES ? lane % 4 * 2 + e : lane / 4; }

constexpr int D_0 = 2 * TILES_0 - 1, D_1 = 2 * TILES_1 - 1, D_2 = 2 * TILES_2 - 1;

// What becomes -infinity times the unit.
__device__ __forceinline__ float masked(float unit) { return copysignf(__int_as_float(0x7f800000), -unit); }

// A warp's share of its head's bias, which it makes with SHARES - 1 other warps: distances warp / HEADS, + SHARES, ...
// They are fetched before the warp waits for maps, all at once, since nothing else hides their latency.
template <int SHARES>
struct BiasShare {
  static constexpr int COUNT = (DISTANCES + SHARES - 1) / SHARES;
  BiasElement its[COUNT][2];
  bool exists[2];  // whether the map has the tokens of the lane's pair e

  // `rpb` is the head's.
  __device__ __forceinline__ BiasShare(const BiasElement* rpb, const Layout& s, int warp, int lane) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      exists[e] = true;
#pragma unroll
      for (int a = 0; a < 3; ++a)
        if (FULL && tiles_of(a) == 1)
          exists[e] &= token_at(a, query_of(lane, e)) < kernel_of(a) && token_at(a, key_of(lane, e)) < kernel_of(a);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const int d = warp / HEADS + i * SHARES;
        const int tiles[3] = {d / (D_1 * D_2), D_0 == 1 ? d / D_2 : d / D_2 % D_1, D_0 * D_1 == 1 ? d : d % D_2};
        bool inside = exists[e] && d < DISTANCES;
        int offset = 0;
#pragma unroll
        for (int a = 0; a < 3; ++a) {
          const int difference = (tiles[a] - tiles_of(a) + 1) * tile_of(a) + token_at(a, key_of(lane, e)) -
                                 token_at(a, query_of(lane, e));
          if (!FULL) inside &= -kernel_of(a) < difference && difference < kernel_of(a);  // else all are
          offset += (difference + kernel_of(a) - 1) * s.axis[a];
        }
        its[i][e] = BiasElement();
#ifdef RPB
        if (inside) its[i][e] = rpb[offset];
#endif
      }
    }
  }
  // `factor` is 1 / unit.
  __device__ __forceinline__ float start(int i, int e, float factor) const {
    return exists[e] ? widen(its[i][e]) * factor : masked(factor);
  }
};

struct Scores {
  float2 bias[HEADS][DISTANCES][32];
  unsigned seen[FULL ? 1 : TILES][32];

  // By all warps of the shares, before a barrier.
  template <int SHARES>
  __device__ __forceinline__ void fill(const BiasShare<SHARES>& from, float factor, const Share& share, int warp,
                                       int lane) {
#pragma unroll
    for (int i = 0; i < from.COUNT; ++i) {
      const int d = warp / HEADS + i * SHARES;
      if (d < DISTANCES) bias[warp % HEADS][d][lane] = make_float2(from.start(i, 0, factor), from.start(i, 1, factor));
    }
    if (FULL) return;
    for (int n = warp; n < TILES; n += SHARES * HEADS)
      seen[n][lane] = keys_seen(share, n, lane, 0) | keys_seen(share, n, lane, 1) << 1;
  }

  // Scores of query tile n and key tile j of a head of the block to start from; `word` is seen[n][lane].
  __device__ __forceinline__ float2 start(int head, int n, int j, unsigned word, float unit, int lane) const {
    float2 its = bias[head][distance(n, j)][lane];
    if (!FULL && !(word >> (2 * j) & 1)) its.x = masked(unit);
    if (!FULL && !(word >> (2 * j + 1) & 1)) its.y = masked(unit);
    return its;
  }
  __device__ __forceinline__ unsigned word(int n, int lane) const { return FULL ? 0 : seen[n][lane]; }

 private:
  // Bit 2 j: whether the query of pair e in tile n sees the key of pair e in tile j.
  static __device__ __forceinline__ unsigned keys_seen(const Share& share, int n, int lane, int e) {
    unsigned of_axes[3];  // bit t: of the tiles at t of the axis
#pragma unroll
    for (int a = 0; a < 3; ++a) {
      const int query = tile_at(a, n) * tile_of(a) + token_at(a, query_of(lane, e));
      const Interval its = keys_of(window_of(a), smaller(query, share.length[a] - 1), share.length[a]);
      of_axes[a] = 0;
#pragma unroll
      for (int t = 0; t < tiles_of(a); ++t) {
        const int key = t * tile_of(a) + token_at(a, key_of(lane, e));
        if (query < share.length[a] && its.start <= key && key < its.end) of_axes[a] |= 1u << t;
      }
    }
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < TILES; ++j)
      bits |= (of_axes[0] >> tile_at(0, j) & of_axes[1] >> tile_at(1, j) & of_axes[2] >> tile_at(2, j) & 1) << 2 * j;
    return bits;
  }
};
