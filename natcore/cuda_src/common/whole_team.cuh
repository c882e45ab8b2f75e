// Teams: HEADS * SPLIT warps of a block, whose heads lie side by side in memory, and how their maps come to shared
// memory.
//
// SPLIT warps share a map's queries. The maps of a team have the same tokens, a row of HEADS heads each. Copies move
// such rows, so that neighbouring lanes have whole lines:
//
//   token 0   | head h | head h + 1 | ... |      team 0: batch entry b, team 1: entry b + 1, ... (AT_ONCE teams)
//   token 1   | head h | head h + 1 | ... |
//   ...
//
// What is asked for first is there first: the last team starts the first copies of all teams, in their order, so that
// teams compute one after another while the others' maps are under way, and only the last map has to wait for all.
// Later copies are a team's own. One barrier says when queries and keys are there, another when values are.
#pragma once

#include "common/whole_map.cuh"
#include "ptx/mbarrier.cuh"

// Rows of a team, of D elements a head: an odd number of chunks, so that ldmatrix meets no bank conflicts.
template <int D>
struct TeamRows {
  static constexpr int CHUNKS = D / 8;  // of a head
  static constexpr int ROW = HEADS * CHUNKS, PITCH = (ROW | 1) * 16;
  static __device__ __forceinline__ int chunk(int, int c) { return c * 16; }
};

constexpr int TOKENS = TILE_ROWS * TILES;  // rows, some of which the map may lack
constexpr int TEAM = 32 * HEADS * SPLIT;   // threads

// Starts a thread's copies of the map at `map`, of a team's rows of D elements a head, one of TEAM threads'. The warps
// of a part take every SPLIT-th tile.
template <int D>
__device__ __forceinline__ void copy_rows(unsigned shared, const Element* map, const Layout& s, const Share& share,
                                          int thread) {
  using Rows = TeamRows<D>;
  constexpr int OF_TILE = TILE_ROWS * Rows::ROW, OF_PART = TEAM / SPLIT;
  const int part = thread / OF_PART;
#pragma unroll
  for (int first = 0; first < OF_TILE; first += OF_PART) {
    const unsigned at = first + thread % OF_PART, token = at / Rows::ROW, chunk = at % Rows::ROW;
    if (at >= OF_TILE || !share.has(0, token)) continue;  // the same of all tiles
    const Element* from = map + (s.of_token(token) + static_cast<int>(chunk) * 8);
    const unsigned to = shared + token * Rows::PITCH + chunk * 16;
#pragma unroll
    for (int i = 0; i < TILES; i += SPLIT) {
      const int n = i + part;
      if (i + SPLIT <= TILES || n < TILES) cp_async_16(to + n * TILE_ROWS * Rows::PITCH, from + s.of_tile(n), true);
    }
  }
}

// Clears the rows that no copy writes, of a head.
template <int D>
__device__ __forceinline__ void clear_missing(unsigned char* map, const Share& share, int lane) {
  constexpr int FIRST = TILE_ROWS == 8 ? 0 : TOKENS;  // shorter tiles are whole
#pragma unroll 1
  for (int i = lane + FIRST * (D / 8); i < ROWS * (D / 8); i += 32) {
    const int row = i / (D / 8);
    if (TILE_ROWS == 8 && share.has(row / 8, row % 8)) continue;
    *reinterpret_cast<uint4*>(map + row * TeamRows<D>::PITCH + i % (D / 8) * 16) = make_uint4(0, 0, 0, 0);
  }
}

__device__ __forceinline__ void team_sync(int team) {
  if (TEAM == 32) {
    __syncwarp();
  } else {
    named_barrier_sync(1 + team, TEAM);
  }
}
