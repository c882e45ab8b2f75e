// Maps of at most 64 tokens, whole: how tokens are numbered, where they lie, and who owns which map.
//
// The map of one (batch entry, head, dilation group) is what a warp works on, or SPLIT of them: its products and
// results are its own. All positions are in-group (see window.cuh); missing axes lead and have extent 1.
//
//   tile   TILE_0 x TILE_1 x TILE_2 = 8 tokens, numbered row-major: one side of an 8x8 block of scores
//   map    TILES_0 x TILES_1 x TILES_2 tiles, numbered row-major. Token i of tile n lies in row TILE_ROWS n + i of
//          shared memory
//
//   7 x 7, tiles of 1 x 8        a block of scores: the 8 keys of a tile times the 8 queries of another one
//   0 0 0 0 0 0 0 .              Two blocks whose tiles are equally far apart hold the same differences key - query at
//   1 1 1 1 1 1 1 .              the same places: the bias is one block for each distance of tiles (13 here), whatever
//   2 2 2 2 2 2 2 .              the window, and so are the sums of drpb.
//   ...                          Tokens that the map lacks (.) are zeros; where they are the same ones of every tile,
//                                7 rows a tile are enough: the eighth is the next tile's first, which the mask hides.
//
// Defines: ELEMENT, RPB (undefined = no bias), HEAD_DIM, HEAD_DIM_V, WARPS, HEADS (of a block), SPLIT (warps of a map),
// STAGES (maps of a warp in shared memory), BLOCKS_PER_SM, FULL (all queries see all keys, and each axis is one tile or
// whole ones) and, for a = 0, 1, 2: KERNEL_a, STRIDE_a, CAUSAL_a, DILATION_a, TILE_a, TILES_a.
#pragma once

#include "common/anew.cuh"
#include "common/elements.cuh"
#include "common/shared_rows.cuh"
#include "common/window.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"

constexpr int THREADS = 32 * WARPS, AT_ONCE = WARPS / (HEADS * SPLIT);  // batch entries
constexpr int TILES = TILES_0 * TILES_1 * TILES_2;
constexpr int TILE_ROWS = FULL && TILE_2 == 8 && TILES_2 == 1 ? KERNEL_2 : 8, ROWS = TILE_ROWS * (TILES - 1) + 8;
constexpr int PAIRS = (TILES + 1) / 2;  // of tiles: the m16 side of an mma
constexpr int DISTANCES = (2 * TILES_0 - 1) * (2 * TILES_1 - 1) * (2 * TILES_2 - 1);  // of two tiles
constexpr int D_CHUNKS = HEAD_DIM / 8, V_CHUNKS = HEAD_DIM_V / 8;
constexpr int D_PITCH = Rows<HEAD_DIM>::PITCH, V_PITCH = Rows<HEAD_DIM_V>::PITCH;

static_assert(TILE_0 * TILE_1 * TILE_2 == 8, "a tile is one side of a block of scores");
static_assert(WARPS % (HEADS * SPLIT) == 0, "each head has as many warps");
static_assert(TILES <= 8, "a map has at most 64 tokens");
static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM_V % 8 == 0, "rows are whole 16-byte chunks");

__device__ constexpr int of_axis(int a, int x0, int x1, int x2) { return a == 0 ? x0 : a == 1 ? x1 : x2; }
__device__ constexpr int kernel_of(int a) { return of_axis(a, KERNEL_0, KERNEL_1, KERNEL_2); }
__device__ constexpr int dilation_of(int a) { return of_axis(a, DILATION_0, DILATION_1, DILATION_2); }
__device__ constexpr int tile_of(int a) { return of_axis(a, TILE_0, TILE_1, TILE_2); }
__device__ constexpr int tiles_of(int a) { return of_axis(a, TILES_0, TILES_1, TILES_2); }
__device__ __forceinline__ Axis window_of(int a) {
  return {0, kernel_of(a), of_axis(a, STRIDE_0, STRIDE_1, STRIDE_2), 1, of_axis(a, CAUSAL_0, CAUSAL_1, CAUSAL_2)};
}

// Where tile n lies among tiles, and token i in its tile. (No remainder where there is nothing to take off.)
__device__ constexpr int tile_at(int a, int n) {
  return of_axis(a, n / (TILES_1 * TILES_2), TILES_0 == 1 ? n / TILES_2 : n / TILES_2 % TILES_1,
                 TILES_0 * TILES_1 == 1 ? n : n % TILES_2);
}
__device__ constexpr int token_at(int a, int i) {
  return of_axis(a, i / (TILE_1 * TILE_2), TILE_0 == 1 ? i / TILE_2 : i / TILE_2 % TILE_1,
                 TILE_0 * TILE_1 == 1 ? i : i % TILE_2);
}
// The number of a distance, and of the distance of two tiles.
__device__ constexpr int distance_number(int d0, int d1, int d2) {
  return ((d0 + TILES_0 - 1) * (2 * TILES_1 - 1) + d1 + TILES_1 - 1) * (2 * TILES_2 - 1) + d2 + TILES_2 - 1;
}
__device__ constexpr int distance(int query, int key) {
  return distance_number(tile_at(0, key) - tile_at(0, query), tile_at(1, key) - tile_at(1, query),
                         tile_at(2, key) - tile_at(2, query));
}

// ---- sizes and strides: written by natcore/planning/whole.py ----

struct Sizes {
  int extent[3], batch, heads, heads_per_kv, slices;  // a block takes every slices-th AT_ONCE batch entries
};

struct Layout {  // strides in elements; `step` is that of neighbours in a dilation group
  long long batch;
  int head, axis[3], step[3];

  __device__ __forceinline__ int of_tile(int n) const {
    int elements = 0;
#pragma unroll
    for (int a = 0; a < 3; ++a)
      if (tiles_of(a) > 1) elements += tile_at(a, n) * tile_of(a) * step[a];
    return elements;
  }
  __device__ __forceinline__ int of_token(int i) const {
    int elements = 0;
#pragma unroll
    for (int a = 0; a < 3; ++a)
      if (tile_of(a) > 1) elements += token_at(a, i) * step[a];
    return elements;
  }
};

// What a warp owns: HEADS heads of a block lie side by side in memory, so that each token's are fetched at one time.
// Blocks are numbered by dilation groups, then slices of the batch; blockIdx.y is of heads.
struct Share {
  int head, group[3], length[3], slice, number;  // number: of slice and group

  __device__ __forceinline__ Share(const Sizes& sizes, int warp) {
    head = blockIdx.y * HEADS + warp % HEADS;
    int rest = number = blockIdx.x;
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      group[a] = rest % dilation_of(a);
      rest /= dilation_of(a);
      length[a] = FULL ? kernel_of(a) : group_length({sizes.extent[a], 1, 1, dilation_of(a), 0}, group[a]);
    }
    slice = rest;
  }
  // Where a map starts: found anew each time, as registers are few.
  template <typename T>
  __device__ __forceinline__ T* base(T* pointer, const Layout& s, int its_head, int entry) const {
    int elements = anew(its_head) * s.head;
#pragma unroll
    for (int a = 0; a < 3; ++a)
      if (dilation_of(a) > 1) elements += group[a] * s.axis[a];
    return pointer + (entry * s.batch + elements);
  }
  // Whether the map has token i of tile n.
  __device__ __forceinline__ bool has(int n, int i) const {
    bool is = true;
#pragma unroll
    for (int a = 0; a < 3; ++a)
      if (!FULL || tiles_of(a) == 1) is &= tile_at(a, n) * tile_of(a) + token_at(a, i) < length[a];
    return is;
  }
};

// ---- copies of a warp: a lane has 16 bytes of a token ----

// Calls f(tile, token, chunk) for each chunk of 16 bytes of a map's rows of D elements that is this lane's.
template <int D, typename F>
__device__ __forceinline__ void for_chunks(int lane, const F& f) {
  constexpr int CHUNKS = D / 8;
#pragma unroll
  for (int p = 0; p < (TILE_ROWS * CHUNKS + 31) / 32; ++p) {
    const int i = p * 32 + lane, token = i / CHUNKS, chunk = i % CHUNKS;
    if (i >= TILE_ROWS * CHUNKS) break;
#pragma unroll
    for (int n = 0; n < TILES; ++n) f(n, token, chunk);
  }
}

// Starts the copies of a map to `shared`; tokens that it lacks become zeros.
template <int D>
__device__ __forceinline__ void load_map(unsigned shared, const Element* from, const Layout& s, const Share& share,
                                         int lane) {
  for_chunks<D>(lane, [&](int n, int token, int chunk) {
    const bool has = share.has(n, token);
    cp_async_16(shared + (TILE_ROWS * n + token) * Rows<D>::PITCH + Rows<D>::chunk(token, chunk),
                from + (has ? s.of_token(token) + s.of_tile(n) + chunk * 8 : 0), has);
  });
}

// Starts the copies of one number for each token, 8 a tile.
__device__ __forceinline__ void load_scalars(unsigned shared, const float* from, const Layout& s, const Share& share,
                                             int lane) {
#pragma unroll
  for (int p = 0; p < (8 * TILES + 31) / 32; ++p) {
    const int row = p * 32 + lane;
    if (row >= 8 * TILES) break;
    const bool has = share.has(row / 8, row % 8);
    cp_async_small<4>(shared + row * 4, from + (has ? s.of_token(row % 8) + s.of_tile(row / 8) : 0), has);
  }
}

// Stores a map from `shared`.
template <int D>
__device__ __forceinline__ void store_map(Element* to, const unsigned char* shared, const Layout& s,
                                          const Share& share, int lane) {
  for_chunks<D>(lane, [&](int n, int token, int chunk) {
    if (share.has(n, token))
      *reinterpret_cast<uint4*>(to + (s.of_token(token) + s.of_tile(n) + chunk * 8)) = *reinterpret_cast<const uint4*>(
          shared + (TILE_ROWS * n + token) * Rows<D>::PITCH + Rows<D>::chunk(token, chunk));
  });
}

// Clears the last tile's rows, some of which no copy writes.
template <int D>
__device__ __forceinline__ void clear_last(unsigned char* shared, int lane) {
  if (TILE_ROWS == 8) return;
  for (int i = lane; i < 8 * Rows<D>::PITCH / 16; i += 32)
    reinterpret_cast<uint4*>(shared + TILE_ROWS * (TILES - 1) * Rows<D>::PITCH)[i] = make_uint4(0, 0, 0, 0);
}

// ---- operands of products; Rows says how rows lie, as struct Rows does ----

// Rows of two tiles, elements 16 c ... + 15, as an A operand.
template <typename Rows>
__device__ __forceinline__ void load_rows(unsigned (&r)[4], unsigned map, int n0, int n1, int c, int lane) {
  const int token = smaller(lane % 8, TILE_ROWS - 1);  // not the next tile's first, which might be another warp's
  const int row = TILE_ROWS * (lane / 8 % 2 == 0 ? n0 : n1) + token;
  ldmatrix_x4(r, map + row * Rows::PITCH + Rows::chunk(token, smaller(2 * c + lane / 16, Rows::CHUNKS - 1)));
}

// Rows of tile n, elements 16 c ... + 31, as two B operands of a product along the elements.
template <typename Rows>
__device__ __forceinline__ void load_columns(unsigned (&r)[4], unsigned map, int n, int c, int lane) {
  ldmatrix_x4(r, map + (TILE_ROWS * n + lane % 8) * Rows::PITCH +
                     Rows::chunk(lane % 8, smaller(2 * c + lane / 8, Rows::CHUNKS - 1)));
}

// Rows of tiles n and n + 1, chunks c ... c + 3, as B operands of a product along the tokens: r[i] is of chunk c + i.
// Of one tile, r[i][0] is.
template <typename Rows, bool BOTH>
__device__ __forceinline__ void load_tokens(unsigned (&r)[4][2], unsigned map, int n, int c, int lane) {
  const int token = lane % 8;
  if (BOTH) {
    const unsigned row = map + (TILE_ROWS * (n + lane / 8 % 2) + token) * Rows::PITCH;
#pragma unroll
    for (int i = 0; i < 4 && c + i < Rows::CHUNKS; i += 2) {
      unsigned four[4];
      ldmatrix_x4_transposed(four, row + Rows::chunk(token, smaller(c + i + lane / 16, Rows::CHUNKS - 1)));
      r[i][0] = four[0], r[i][1] = four[1], r[i + 1][0] = four[2], r[i + 1][1] = four[3];
    }
  } else {
    unsigned four[4];
    ldmatrix_x4_transposed(four, map + (TILE_ROWS * n + token) * Rows::PITCH +
                                     Rows::chunk(token, smaller(c + lane / 8, Rows::CHUNKS - 1)));
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i][0] = four[i];
  }
}

// Of tile n and the next one, if there is one.
template <typename Rows>
__device__ __forceinline__ void load_tokens(unsigned (&r)[4][2], unsigned map, int n, int c, int lane) {
  if (n + 1 < TILES) {
    load_tokens<Rows, true>(r, map, n, c, lane);
  } else {
    load_tokens<Rows, false>(r, map, n, c, lane);
  }
}

// Writes a pair of a C tile, whose rows are tile n's and whose columns are of chunk c, to a map.
template <int D>
__device__ __forceinline__ void write_pair(unsigned char* map, int n, int c, float low, float high, int lane) {
  const int token = lane / 4;
  *reinterpret_cast<unsigned*>(map + (TILE_ROWS * n + token) * Rows<D>::PITCH + Rows<D>::chunk(token, c) +
                               lane % 4 * 4) = pack<Element>(low, high);
}
__device__ __forceinline__ bool writes(int lane) { return lane / 4 < TILE_ROWS; }  // whether the lane is to do so

// Operands times a number: a scale that is not to be in the softmax's unit.
template <int COUNT>
__device__ __forceinline__ void scale_pairs(unsigned (&pairs)[COUNT], float factor) {
#pragma unroll
  for (unsigned& pair : pairs) pair = pack<Element>(factor * low<Element>(pair), factor * high<Element>(pair));
}
