// Tiles of 16 own tokens and the box of tokens that they see, for the two passes of the tiled backward.
//
// In the pass of queries own tokens are queries, and the seen ones their keys; in that of keys (OWN_KEYS) it is the
// other way round. A problem has three axes here, in an order that the planner chooses; missing ones have extent and
// kernel 1. All positions are in-group (see window.cuh). Axis 0 counts planes, axis 1 rows, axis 2 columns.
//
//   tile     1 x TILE_1 x TILE_2 = 16 own tokens: the m16 side of an mma, owned by a warp
//   region   REGION_1 x REGION_2 tiles of one plane, one for each warp: what a block works on at a time
//   box      what the tokens of a tile see: an interval on each axis, of whatever length it has there
//   span     the union of the region's boxes. Its planes come through shared memory one after the other
//   step     16 tokens of a box, two n8 sides: 8 columns of two rows or, where a tile is one row, 16 columns of one
//   line     the steps down 8 columns of a plane of a box or, where a tile is one row, along a row
//
//   tile of 2 x 8 queries, kernel 7 x 7, one plane of its box: two lines of four steps
//
//            a a a a a a a a|b b b b b b         a step: the keys of the same letter in two rows. Columns beyond
//            a a a a a a a a|b b b b b b         the box and a row below it are masked; their slots hold zeros or
//            ---------------+-----------         tokens of the map.
//            . . . . . . . . . . . . . .
//            . . . Q Q Q Q Q Q Q Q . . .         The LSE is known, so steps do not wait for each other.
//            . . . Q Q Q Q Q Q Q Q . . .
//              ...
//
// The last tile of an axis is moved back inside the map and stores only the tokens that no other tile owns.
//
// Defines: OWN_KEYS, ELEMENT, FLOAT32 (that this is float32), RPB (undefined = no bias),
// HEAD_DIM, HEAD_DIM_V, HEADS_PER_KV, TILE_1, TILE_2, REGION_1,
// REGION_2, SPAN_1 (rows, one more where steps have two), SPAN_2 (columns, a multiple of 8), STAGES (planes in shared
// memory), BLOCKS_PER_SM; LINES and STEPS (the most of a plane of a box), PLANES (of a box); TABLE_ROW (pitch of the
// difference table) and, for a = 0, 1, 2, KERNEL_a, STRIDE_a, CAUSAL_a, DILATION_a and the difference table's
// FIRST_DIFFERENCE_a and DIFFERENCES_a (key - query).
#pragma once

#include "common/elements.cuh"
#include "common/shared_rows.cuh"
#include "common/window.cuh"

constexpr int CHUNK_ELEMENTS = 16 / sizeof(Element);  // of 16 bytes
template <int D>
using Row = Rows<D, sizeof(Element)>;

constexpr int WARPS = REGION_1 * REGION_2, THREADS = 32 * WARPS;
constexpr int STEP_ROWS = TILE_1 > 1 ? 2 : 1, STEP_COLUMNS = 16 / STEP_ROWS;
constexpr int D = (HEAD_DIM + 15) / 16 * 16, V = (HEAD_DIM_V + 15) / 16 * 16;  // padded with zeros
constexpr bool SCARCE = D + V > 96;  // registers: addresses are then found again where they are needed
// Rows g and g + 8 of a tile are so many rows and columns apart.
constexpr int HALF_ROWS = TILE_2 < 16 ? 8 / TILE_2 : 0, HALF_COLUMNS = TILE_2 < 16 ? 0 : 8;
constexpr int SEEN_HEADS = OWN_KEYS ? HEADS_PER_KV : 1;  // heads of seen tokens for one of own ones

static_assert(TILE_1 * TILE_2 == 16 && (TILE_2 == 4 || TILE_2 == 8 || TILE_2 == 16), "a tile is the 16 rows of an mma");
static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM_V % 8 == 0, "rows are whole 16-byte chunks and n8 tiles");
static_assert(SPAN_2 % 8 == 0, "the permutation of a token's chunks depends on its column alone");

constexpr int OUT_CHUNKS = (V / CHUNK_ELEMENTS + 3) / 4;  // of a row of O, of each of four lanes
constexpr int SIDE_SLOTS = STEP_ROWS == 2 ? SPAN_2 : 8;   // from one n8 side of a step to the other
constexpr int STEP_SLOTS = STEP_ROWS == 2 ? 2 * SPAN_2 : 16;

// ---- shared memory, in bytes ----

constexpr int SLOTS = SPAN_1 * SPAN_2;  // of a plane: one for each token
constexpr int D_PITCH = Row<D>::PITCH, V_PITCH = Row<V>::PITCH;
constexpr int SEEN_V_AT = SLOTS * D_PITCH, SCALARS_AT = SEEN_V_AT + SLOTS * V_PITCH;
constexpr int STAGE = (SCALARS_AT + (OWN_KEYS ? SLOTS * 8 : 0) + 127) / 128 * 128;
constexpr int OWN_AT = STAGES * STAGE, OWN = 16 * (D_PITCH + V_PITCH);  // each warp's own tokens
// Those of float32 that are too many for registers stay there, while the next ones come.
constexpr int OWN_STAGES = sizeof(Element) == 4 && D + V > 64 ? 2 : 1;
constexpr int TABLE_AT = OWN_AT + WARPS * OWN_STAGES * OWN;
constexpr int TABLE_PLANE = DIFFERENCES_1 * TABLE_ROW, TABLE = DIFFERENCES_0 * TABLE_PLANE;  // floats
constexpr int TABLES = BIASED ? 2 : 1;  // of a head: with a mask; without
constexpr int SUMS_AT = (TABLE_AT + (BIASED ? SEEN_HEADS : 1) * TABLES * TABLE * 4 + 15) / 16 * 16;
constexpr int SUMS = BIASED && !OWN_KEYS ? PLANES * LINES * (STEPS + 1) * 512 : 0;  // each warp's sums for drpb
constexpr int REGIONS_AT = SUMS_AT + WARPS * SUMS, REGION = 96;
constexpr int TILES_AT = REGIONS_AT + 3 * REGION, TILE = 64;  // two of each warp
constexpr int KINDS_AT = TILES_AT + 2 * WARPS * TILE;         // what a warp's sums are of, 16 bytes each
constexpr int FLAGS_AT = KINDS_AT + WARPS * 16;
constexpr int SHARED_BYTES = FLAGS_AT + 16;

// ---- sizes and strides: written by natcore/planning/tiled_backward.py ----

struct Sizes {
  int extent[3], batch, heads;  // of own tokens
  int regions[2];               // on axes 1 and 2, of the longest dilation group
  int slices, items;            // blocks that share a head, and what they share
};

struct Layout {  // strides in elements; `step` is that of neighbours in a dilation group
  long long batch;
  int head, axis[3], step[3];

  __device__ __forceinline__ long long offset(int x0, int x1, int x2) const {
    return static_cast<long long>(x0) * step[0] + static_cast<long long>(x1) * step[1] +
           static_cast<long long>(x2) * step[2];
  }
};

#define NATCORE_PER_AXIS(NAME, CONSTANT)    \
  __device__ constexpr int NAME(int a) {    \
    return a == 0 ? CONSTANT##_0 : a == 1 ? CONSTANT##_1 : CONSTANT##_2; \
  }
NATCORE_PER_AXIS(kernel_of, KERNEL)
NATCORE_PER_AXIS(stride_of, STRIDE)
NATCORE_PER_AXIS(causal_of, CAUSAL)
NATCORE_PER_AXIS(dilation_of, DILATION)
NATCORE_PER_AXIS(first_difference_of, FIRST_DIFFERENCE)
#undef NATCORE_PER_AXIS
__device__ constexpr int tile_of(int a) { return a == 0 ? 1 : a == 1 ? TILE_1 : TILE_2; }
__device__ constexpr int region_of(int a) { return a == 0 ? 1 : a == 1 ? REGION_1 : REGION_2; }

__device__ __forceinline__ Axis window_of(int a) { return {0, kernel_of(a), stride_of(a), 1, causal_of(a)}; }

// What an own token sees, on one axis.
__device__ __forceinline__ Interval seen_by(int a, int x, int length) {
  return OWN_KEYS ? queries_of(window_of(a), x, length) : keys_of(window_of(a), x, length);
}

// The first token of a tile, which is moved back inside the map.
__device__ __forceinline__ int first_token(int a, int owned, int length) {
  return smaller(owned, larger(length - tile_of(a), 0));
}

// What a block works on at a time.
struct Region {
  int item;             // -1: there is none
  int batch, group[3], length[3];
  int owned[3];         // the first token of each axis
  Interval planes;      // that it sees
  int row, rows, column, columns;  // the span on axes 1 and 2
  bool moved;                      // whether it differs from the one before by more than the batch entry

  // The items of a head are numbered batch entries fastest: these have tiles alike.
  __device__ __forceinline__ bool find(const Sizes& sizes) {
    int rest = item / sizes.batch;
    batch = item - rest * sizes.batch;
    const int planes0 = (sizes.extent[0] + DILATION_0 - 1) / DILATION_0;
    const int counts[3] = {planes0, sizes.regions[0], sizes.regions[1]};
    int number[3];
#pragma unroll
    for (int n = 0; n < 3; ++n) {  // planes, then columns, then rows
      const int a = n == 0 ? 0 : 3 - n;
      number[a] = rest % counts[a];
      rest /= counts[a];
    }
    bool exists = true;
#pragma unroll
    for (int a = 2; a >= 0; --a) {
      group[a] = rest % dilation_of(a);
      rest /= dilation_of(a);
      length[a] = (sizes.extent[a] - group[a] + dilation_of(a) - 1) / dilation_of(a);
      owned[a] = number[a] * region_of(a) * tile_of(a);
      exists = exists && owned[a] < length[a];
    }
    if (!exists) return false;
    planes = seen_by(0, owned[0], length[0]);
    Interval span[3];
#pragma unroll
    for (int a = 1; a < 3; ++a) {
      const int last = smaller(owned[a] + region_of(a) * tile_of(a), length[a]) - 1;
      span[a] = {seen_by(a, first_token(a, owned[a], length[a]), length[a]).start, seen_by(a, last, length[a]).end};
    }
    row = span[1].start, rows = span[1].end - row;
    column = span[2].start, columns = span[2].end - column;
    return true;
  }
  // The first region from an item on.
  __device__ __forceinline__ void find_from(const Sizes& sizes, int first, int end) {
    moved = true;
    for (item = first; item < end; ++item)
      if (find(sizes)) return;
    item = -1;
  }
  // The one after another one, if there is that.
  __device__ __forceinline__ void find_after(const Region& before, const Sizes& sizes, int end) {
    if (before.item < 0 || before.item + 1 == end) {
      item = -1;
    } else if (before.batch + 1 < sizes.batch) {
      *this = before;
      ++item, ++batch;
      moved = false;
    } else {
      find_from(sizes, before.item + 1, end);
    }
  }
  // Where in-group position (0, 0, 0) lies.
  template <typename T>
  __device__ __forceinline__ T* base(T* pointer, const Layout& s, int head) const {
    long long offset = batch * s.batch + static_cast<long long>(head) * s.head;
#pragma unroll
    for (int a = 0; a < 3; ++a)
      if (dilation_of(a) > 1) offset += static_cast<long long>(group[a]) * s.axis[a];
    return pointer + offset;
  }
  // Where the first slot of a plane of the span lies.
  template <typename T>
  __device__ __forceinline__ T* first_slot(T* pointer, const Layout& s, int head, int plane) const {
    return base(pointer, s, head) + s.offset(plane, row, column);
  }
};
static_assert(sizeof(Region) <= REGION, "regions have their place in shared memory");

// Where a warp's tile lies.
struct Tile {
  int first[3], skip[3], left[3];  // on axes 1 and 2: the first token; how many another tile owns; how many the map has
  Interval rows, columns;          // of its box
  int exists, plain;               // plain: what is seen depends on differences alone

  __device__ __forceinline__ Tile(const Region& region, int warp) {
    exists = plain = true;
    Interval box[3];
#pragma unroll
    for (int a = 1; a < 3; ++a) {
      const int number = a == 1 ? warp / REGION_2 : warp % REGION_2, length = region.length[a], size = tile_of(a);
      const int owned = region.owned[a] + number * size, kernel = kernel_of(a);
      exists = exists && owned < length;
      first[a] = first_token(a, owned, length);
      skip[a] = owned - first[a];
      left[a] = length - first[a];
      const int end = smaller(first[a] + size, length);
      box[a] = {seen_by(a, first[a], length).start, seen_by(a, end - 1, length).end};
      if (size == 1) continue;  // its box is exact
      bool inside = stride_of(a) == 1 && first[a] + size <= length;
      if (OWN_KEYS) {
        inside = inside && (causal_of(a) ? end - 1 + kernel <= length : first[a] >= kernel && end <= length - kernel);
      } else if (!causal_of(a)) {
        inside = inside && first[a] >= kernel / 2 && end - 1 - kernel / 2 + kernel <= length;
      }
      plain = plain && inside;
    }
    rows = box[1], columns = box[2];
  }
  static __device__ __forceinline__ int row_of(int token) { return static_cast<unsigned>(token) / TILE_2; }
  static __device__ __forceinline__ int column_of(int token) { return static_cast<unsigned>(token) % TILE_2; }
  __device__ __forceinline__ bool inside(int token) const {
    return (row_of(token) < left[1]) & (column_of(token) < left[2]);
  }
  __device__ __forceinline__ bool stores(int token) const {
    return inside(token) & (row_of(token) >= skip[1]) & (column_of(token) >= skip[2]);
  }
  // Where its first token lies, and from there another one.
  template <typename T>
  __device__ __forceinline__ T* base(T* pointer, const Layout& s, const Region& region, int head) const {
    return region.base(pointer, s, head) + s.offset(region.owned[0], first[1], first[2]);
  }
  static __device__ __forceinline__ int offset(const Layout& s, int token) {
    return row_of(token) * s.step[1] + column_of(token) * s.step[2];
  }
  __device__ __forceinline__ int lines() const {
    return STEP_ROWS == 2 ? (columns.end - columns.start + 7) / 8 : rows.end - rows.start;
  }
  __device__ __forceinline__ int steps() const {
    return STEP_ROWS == 2 ? (rows.end - rows.start + 1) / 2 : (columns.end - columns.start + 15) / 16;
  }
};
static_assert(sizeof(Tile) <= TILE, "tiles have their place in shared memory");
