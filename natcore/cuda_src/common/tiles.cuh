// Tiles of 16 queries and the halo of keys that they share, for the tensor core kernels.
//
// A problem has three axes here, in an order that the planner chooses; missing ones have extent and
// kernel 1. All positions are in-group (see window.cuh).
//
//   region   REGION_a tiles of TILE_a queries per axis: what a block owns
//   span     SPAN_a keys per axis: the union of the region's halos, one slot of shared memory each
//   halo     HALO_a keys per axis: the union of one tile's windows, numbered along the rows
//
// Row pitches are such that the numbers of a tile's keys and their slots differ by a constant modulo 8.
// So eight consecutive keys lie in slots that all differ modulo 8, and where in its slot a chunk of 16
// bytes lies can be permuted by the slot such that ldmatrix meets no bank twice: `Rows` says how.
//
// The last tile of an axis is moved back inside the map and stores only the queries that no other tile
// owns; a halo that would leave the map at its end is moved back too. Slots beyond the map hold zeros.
//
// Defines: ELEMENT, FLOAT32 (that this is float32), RPB (undefined = no bias),
// HEAD_DIM, HEAD_DIM_V, RANK, THREADS, BLOCKS_PER_SM, STAGES
// (spans in shared memory), LOOPED (a block takes several batch entries), CHUNK (n8 blocks of scores held
// at once), KEPT (a warp has one tile, whose accumulators stay in registers from one batch entry to the
// next) and, for a = 0, 1, 2: KERNEL_a, STRIDE_a, CAUSAL_a, DILATION_a, TILE_a, REGION_a, HALO_a, SPAN_a, and
// the difference table's FIRST_DIFFERENCE_a and DIFFERENCES_a (key - query); pitches in slots, SLOT_ROW,
// SLOT_PLANE, and in floats, TABLE_ROW, TABLE_COPY.
#pragma once

#include "common/anew.cuh"
#include "common/elements.cuh"
#include "common/shared_rows.cuh"
#include "common/window.cuh"

constexpr int CHUNK_ELEMENTS = 16 / sizeof(Element);  // of 16 bytes
template <int D>
using Row = Rows<D, sizeof(Element)>;

__device__ constexpr int of_axis(int a, int x0, int x1, int x2) { return a == 0 ? x0 : a == 1 ? x1 : x2; }
#define NATCORE_PER_AXIS(NAME, CONSTANT) \
  __device__ constexpr int NAME(int a) { return of_axis(a, CONSTANT##_0, CONSTANT##_1, CONSTANT##_2); }
NATCORE_PER_AXIS(kernel_of, KERNEL)
NATCORE_PER_AXIS(stride_of, STRIDE)
NATCORE_PER_AXIS(causal_of, CAUSAL)
NATCORE_PER_AXIS(dilation_of, DILATION)
NATCORE_PER_AXIS(tile_of, TILE)
NATCORE_PER_AXIS(region_of, REGION)
NATCORE_PER_AXIS(halo_of, HALO)
NATCORE_PER_AXIS(span_of, SPAN)
NATCORE_PER_AXIS(first_difference_of, FIRST_DIFFERENCE)
NATCORE_PER_AXIS(differences_of, DIFFERENCES)
#undef NATCORE_PER_AXIS

constexpr int TILES = REGION_0 * REGION_1 * REGION_2;
constexpr int KEYS = HALO_0 * HALO_1 * HALO_2;
constexpr int BLOCKS = (KEYS + 7) / 8;
constexpr int D_CHUNKS = HEAD_DIM / CHUNK_ELEMENTS, V_TILES = HEAD_DIM_V / 8;
constexpr int D_STEPS = (D_CHUNKS + 1) / 2;                                      // of a product: two chunks
constexpr int O_TILES = sizeof(Element) == 2 ? V_TILES : (V_TILES + 1) / 2 * 2;  // of O: of float32, pairs
constexpr int SLOTS = (SPAN_0 - 1) * SLOT_PLANE + (SPAN_1 - 1) * SLOT_ROW + SPAN_2;

constexpr int K_PITCH = Row<HEAD_DIM>::PITCH, V_PITCH = Row<HEAD_DIM_V>::PITCH;
constexpr int SPAN = SLOTS * (K_PITCH + V_PITCH);                        // bytes of K and V of a region
constexpr int STAGE = 16 * (K_PITCH > V_PITCH ? K_PITCH : V_PITCH);      // bytes of a tile of Q, later of O
constexpr int TABLE_PLANE = DIFFERENCES_1 * TABLE_ROW;
constexpr bool UNCLAMPED = STRIDE_0 == 1 && STRIDE_1 == 1 && STRIDE_2 == 1;  // windows that depend on differences alone

static_assert(!KEPT || (TILES == THREADS / 32 && CHUNK >= BLOCKS), "a warp keeps one tile whole");
static_assert(TILES <= THREADS, "each thread finds one tile");
static_assert(TILE_0 * TILE_1 * TILE_2 == 16, "a tile is the 16 rows of an mma");
static_assert((TILE_1 & (TILE_1 - 1)) == 0 && (TILE_2 & (TILE_2 - 1)) == 0, "tile extents are powers of two");
static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM_V % 8 == 0, "rows are whole 16-byte chunks and n8 tiles");
static_assert(CHUNK >= BLOCKS || CHUNK % 4 == 0, "chunks are whole mask words");
static_assert(HALO_2 <= 32 || (HALO_0 == 1 && HALO_1 == 1), "a long row is the only one");
static_assert(HALO_0 <= 32 && HALO_1 <= 32, "a mask word for each outer axis");

// ---- sizes and strides: written by natcore/planning/tiled.py ----

struct Divisor {  // of numbers below 2^31, by multiplication (Granlund and Montgomery, 1994)
  unsigned value, multiplier, shift;
  __device__ __forceinline__ unsigned divide(unsigned n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

struct Sizes {
  int extent[3];
  int batch, splits;  // a block takes every splits-th batch entry
  Divisor heads, heads_per_kv, regions[3];  // regions of the longest dilation group
};

struct Layout {  // strides in elements; `step` is that of neighbours in a dilation group
  long long batch;
  int head, axis[3], step[3];

  __device__ __forceinline__ long long offset(int x0, int x1, int x2) const {
    long long elements = static_cast<long long>(x2) * step[2];
    if (RANK > 1) elements += static_cast<long long>(x1) * step[1];
    if (RANK > 2) elements += static_cast<long long>(x0) * step[0];
    return elements;
  }
};

__device__ __forceinline__ Axis window_of(int a) { return {0, kernel_of(a), stride_of(a), 1, causal_of(a)}; }

// The first query of a tile, and the first key of its halo.
__device__ __forceinline__ int first_query(int a, int tile, int length) {
  return smaller(tile * tile_of(a), larger(length - tile_of(a), 0));
}
__device__ __forceinline__ int first_key(int a, int query, int length) {
  return smaller(keys_of(window_of(a), query, length).start, larger(length - halo_of(a), 0));
}

// What a block owns. Blocks are numbered heads fastest, then regions, dilation groups and batch splits.
struct Region {
  int head, head_kv, split, group[3], length[3], tile[3], key[3];

  __device__ __forceinline__ Region(const Sizes& sizes, unsigned block) {
    unsigned rest = sizes.heads.divide(block);
    head = static_cast<int>(block - rest * sizes.heads.value);
    head_kv = static_cast<int>(sizes.heads_per_kv.divide(head));
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      const unsigned next = sizes.regions[a].divide(rest);
      tile[a] = static_cast<int>(rest - next * sizes.regions[a].value) * region_of(a);
      rest = next;
    }
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      group[a] = static_cast<int>(rest % dilation_of(a));
      rest /= dilation_of(a);
      length[a] = (sizes.extent[a] - group[a] + dilation_of(a) - 1) / dilation_of(a);
      // As a new value: of the least of three, of which one is length - 1, NVRTC 13.0 (sm_90) loses a sign where it is
      // compared with length, and takes keys below the map for present.
      key[a] = anew(first_key(a, first_query(a, tile[a], length[a]), length[a]));
    }
    split = static_cast<int>(rest);
  }

  // The first element of this block's first batch entry, head and dilation group.
  template <typename T>
  __device__ __forceinline__ T* base(T* pointer, const Layout& s, int its_head) const {
    long long offset = split * s.batch + static_cast<long long>(its_head) * s.head;
#pragma unroll
    for (int a = 0; a < 3; ++a)
      if (dilation_of(a) > 1) offset += static_cast<long long>(group[a]) * s.axis[a];
    return pointer + offset;
  }
};

// Which of a tile's 16 rows lies where.
__device__ constexpr int row_axis(int a, int row) {
  return a == 2 ? row % TILE_2 : a == 1 ? row / TILE_2 % TILE_1 : row / (TILE_1 * TILE_2);
}

// Where a tile lies: found once for a block, kept in shared memory.
struct Tile {
  int query[3], length[3];      // first query; of the dilation group
  short shift[3], skip[3];      // from the first query to the first key, and to the first query that it stores
  int slot;                     // of its first key
  bool exists, whole, interior; // whole: it stores all 16 rows; interior: no window of it is clamped

  __device__ __forceinline__ Tile(const Region& region, int index) {
    exists = whole = true, interior = UNCLAMPED;
    slot = 0;
#pragma unroll
    for (int a = 0; a < 3; ++a) {
      const int local =
          of_axis(a, index / (REGION_1 * REGION_2), index / REGION_2 % REGION_1, index % REGION_2);
      const int owned = (region.tile[a] + local) * tile_of(a);
      length[a] = region.length[a];
      query[a] = first_query(a, region.tile[a] + local, length[a]);
      const int key = first_key(a, query[a], length[a]);
      shift[a] = static_cast<short>(key - query[a]);
      skip[a] = static_cast<short>(owned - query[a]);
      exists &= owned < length[a];
      whole &= owned + tile_of(a) <= length[a];
      const int start = query[a] - (causal_of(a) ? kernel_of(a) - 1 : kernel_of(a) / 2);
      interior &= start >= 0 && start + kernel_of(a) + tile_of(a) - 1 <= length[a];
      slot += (key - region.key[a]) * of_axis(a, SLOT_PLANE, SLOT_ROW, 1);
    }
  }
  __device__ __forceinline__ bool inside(int row) const {
    bool is = true;
#pragma unroll
    for (int a = 0; a < 3; ++a) is &= query[a] + row_axis(a, row) < length[a];
    return is;
  }
  __device__ __forceinline__ bool stores(int row) const {
    bool is = inside(row);
#pragma unroll
    for (int a = 0; a < 3; ++a) is &= row_axis(a, row) >= skip[a];
    return is;
  }
};

// Where the key of number first + r lies, in a box of these pitches: first is a constant, r < 16.
template <int PLANE, int ROW>
__device__ __forceinline__ int key_offset(int first, int r) {
  constexpr int AREA = HALO_1 * HALO_2;
  if (first + 15 >= KEYS) r = smaller(r, KEYS - 1 - first);
  int offset = first / AREA * PLANE + first / HALO_2 % HALO_1 * ROW + first % HALO_2 + r;
#pragma unroll
  for (int i = 1; i <= 15 / HALO_2 + 1; ++i) offset += r >= i * HALO_2 - first % HALO_2 ? ROW - HALO_2 : 0;
  if (HALO_0 > 1) {
#pragma unroll
    for (int i = 1; i <= 15 / AREA + 1; ++i) offset += r >= i * AREA - first % AREA ? PLANE - HALO_1 * ROW : 0;
  }
  return offset;
}
