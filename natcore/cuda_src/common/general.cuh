// What the general kernels share: sizes and strides, work items, rows spread over lanes.
//
// Any valid problem has three axes here; missing ones are leading axes of extent and kernel 1.
// Work items are numbered as memory is laid out, heads fastest, and LANES neighbouring lanes of a
// warp own one item. Each lane holds every LANES-th chunk of VECTOR elements of a row:
//
//   LANES 4, VECTOR 8, head_dim 64     element  0      8      16     24     32 ...          56
//                                      lane     |  0   |  1   |  2   |  3   |  0   |  1 ...  3  |
//
// so that a warp's load touches whole sectors, and sums over a row end with log2(LANES) shuffles.
//
// Defines: ELEMENT (dtype of q, k, v, out), HEAD_DIM, HEAD_DIM_V, VECTOR, LANES, THREADS, INDEX (type of
// item numbers) and, where a kernel says so, RPB (dtype of the bias; undefined = no bias) and STRIP
// (neighbours that are loaded at once).
#pragma once

#include "common/elements.cuh"
#include "common/window.cuh"

using Acc = AccumulatorOf<Element>::type;
using Index = INDEX;

constexpr int GROUPS = THREADS / LANES;  // items that a block works on at once
constexpr int RESIDENT = sizeof(Acc) == 8 ? 2 : 3;  // blocks that should fit a multiprocessor: bounds the registers
constexpr Acc LOG2_E = Acc(1.4426950408889634074);
constexpr Acc LN_2 = Acc(0.69314718055994530942);
__device__ __forceinline__ Acc infinity() { return __uint_as_float(0x7f800000u); }

static_assert(LANES <= 32 && (LANES & (LANES - 1)) == 0, "a group of lanes is an aligned part of a warp");
static_assert(HEAD_DIM % VECTOR == 0 && HEAD_DIM_V % VECTOR == 0, "a row is whole chunks");
static_assert(VECTOR * sizeof(Element) <= 16, "a chunk is one load");

// ---- sizes and strides: written by natcore/planning/general.py ----

struct Sizes {
  Axis axis[3];
  int batch, heads, heads_kv;
  int extra;   // additional keys
  int slices;  // parts into which a sum over queries is cut
  int places;  // of a query: the keys of a window, row-major, and the additional ones
  unsigned dropout_threshold;
  double dropout_factor;
};

struct Layout {  // strides in elements; the innermost axis is contiguous
  long long batch, axis[3], head;
};

__device__ __forceinline__ long long offset_of(const Layout& s, int batch, int x0, int x1, int x2, int head) {
  return batch * s.batch + x0 * s.axis[0] + x1 * s.axis[1] + x2 * s.axis[2] + head * s.head;
}

// ---- items ----

struct Place {
  int batch, x[3], head;
  __device__ __forceinline__ long long offset(const Layout& s, int its_head) const {
    return offset_of(s, batch, x[0], x[1], x[2], its_head);
  }
};

// The place of an item, of [batch, x0, x1, x2, heads] in row-major order.
__device__ __forceinline__ Place place_of(Index item, const Sizes& sizes, int heads) {
  Place place;
  place.head = static_cast<int>(item % heads);
  item /= heads;
#pragma unroll
  for (int a = 2; a >= 0; --a) {
    place.x[a] = static_cast<int>(item % sizes.axis[a].extent);
    item /= sizes.axis[a].extent;
  }
  place.batch = static_cast<int>(item);
  return place;
}

// Moves a place on by a step, itself the place of an item number: an odometer, without divisions.
__device__ __forceinline__ void advance(Place& place, const Place& step, const Sizes& sizes, int heads) {
  place.head += step.head;
  int carry = place.head >= heads;
  place.head -= carry ? heads : 0;
#pragma unroll
  for (int a = 2; a >= 0; --a) {
    place.x[a] += step.x[a] + carry;
    carry = place.x[a] >= sizes.axis[a].extent;
    place.x[a] -= carry ? sizes.axis[a].extent : 0;
  }
  place.batch += step.batch + carry;
}

__device__ __forceinline__ Index items(const Sizes& sizes, int heads) {
  return static_cast<Index>(sizes.batch) * sizes.axis[0].extent * sizes.axis[1].extent * sizes.axis[2].extent * heads;
}

// The number of a query of one head in [batch, x0, x1, x2, heads].
__device__ __forceinline__ unsigned long long number_of(const Sizes& sizes, int batch, int x0, int x1, int x2, int head) {
  unsigned long long number = static_cast<unsigned long long>(batch) * sizes.axis[0].extent + x0;
  number = (number * sizes.axis[1].extent + x1) * sizes.axis[2].extent + x2;
  return number * sizes.heads + head;
}

// The place of a key in a window: n is counted from the window's start on each axis.
__device__ __forceinline__ int place_in_window(const Sizes& sizes, int n0, int n1, int n2) {
  return (n0 * sizes.axis[1].kernel + n1) * sizes.axis[2].kernel + n2;
}

// One position of one axis, as its dilation group sees it.
struct Spot {
  int group, inside, length;
  __device__ __forceinline__ Spot(const Axis& axis, int x)
      : group(axis.dilation == 1 ? 0 : x % axis.dilation),
        inside(axis.dilation == 1 ? x : x / axis.dilation),
        length(group_length(axis, group)) {}
  // Where the n-th of this spot's group lies on the axis.
  __device__ __forceinline__ int position(const Axis& axis, int n) const { return n * axis.dilation + group; }
};

// ---- rows spread over lanes ----

__device__ __forceinline__ int lane_in_group() { return threadIdx.x % LANES; }

// The sum of x over the lanes of a group, in every one of them. Groups of one warp may have diverged.
__device__ __forceinline__ Acc group_sum(Acc x) {
#if LANES > 1
  const unsigned first = threadIdx.x % 32 / LANES * LANES;
  const unsigned mask = (LANES == 32 ? 0xffffffffu : (1u << (LANES % 32)) - 1u) << first;
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(mask, x, distance);
#endif
  return x;
}

template <int D>
struct Share {  // of a row of D elements, that lies with one lane
  static constexpr int chunks = D / VECTOR;
  static constexpr int per_lane = (chunks + LANES - 1) / LANES;
  static constexpr int size = per_lane * VECTOR;
  static __device__ __forceinline__ bool owns(int c, int lane) {
    return chunks % LANES == 0 || c * LANES + lane < chunks;
  }
};

struct alignas(VECTOR * sizeof(Element)) Chunk {
  Element x[VECTOR];
};

// A row as it lies in memory; chunks beyond its end are zero.
template <int D>
struct RawRow {
  Chunk chunk[Share<D>::per_lane];

  __device__ __forceinline__ void load(const Element* row, int lane) {
    const Chunk* chunks = reinterpret_cast<const Chunk*>(row);
#pragma unroll
    for (int c = 0; c < Share<D>::per_lane; ++c)
      chunk[c] = Share<D>::owns(c, lane) ? chunks[c * LANES + lane] : Chunk{};
  }
  __device__ __forceinline__ Acc operator[](int i) const { return widen(chunk[i / VECTOR].x[i % VECTOR]); }
};

// A row in the type of arithmetic.
template <int D>
struct Row {
  Acc x[Share<D>::size] = {};

  __device__ __forceinline__ void load(const Element* row, int lane) {
    RawRow<D> raw;
    raw.load(row, lane);
#pragma unroll
    for (int i = 0; i < Share<D>::size; ++i) x[i] = raw[i];
  }
  __device__ __forceinline__ void store(Element* row, int lane, Acc factor) const {
    Chunk* chunks = reinterpret_cast<Chunk*>(row);
#pragma unroll
    for (int c = 0; c < Share<D>::per_lane; ++c) {
      Chunk chunk;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) chunk.x[i] = narrow<Element>(x[c * VECTOR + i] * factor);
      if (Share<D>::owns(c, lane)) chunks[c * LANES + lane] = chunk;
    }
  }
  // This lane's part of the inner product.
  template <typename Other>
  __device__ __forceinline__ Acc dot(const Other& other) const {
    Acc sum = 0;
#pragma unroll
    for (int i = 0; i < Share<D>::size; ++i) sum += x[i] * other[i];
    return sum;
  }
  template <typename Other>
  __device__ __forceinline__ void add(Acc weight, const Other& other) {
#pragma unroll
    for (int i = 0; i < Share<D>::size; ++i) x[i] += weight * other[i];
  }
  __device__ __forceinline__ Acc operator[](int i) const { return x[i]; }
};

// ---- the relative positional bias ----

// Of one head, for the pair (query p, key n), as an offset into the table: entry n - p + kernel - 1 per axis.
__device__ __forceinline__ long long bias_entry(const Sizes& sizes, const Layout& s, int axis, int n, int p) {
  return (n - p + sizes.axis[axis].kernel - 1) * s.axis[axis];
}
