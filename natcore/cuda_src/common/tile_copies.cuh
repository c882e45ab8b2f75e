// Copies between global and shared memory: spans of keys and values, tiles of queries and outputs.
#pragma once

#include "common/tiles.cuh"
#include "ptx/cp_async.cuh"

// The span of keys or values of D elements from `base`, the span's first, each into its slot.
template <int D>
__device__ __forceinline__ void load_span(unsigned shared, const Element* base, const Layout& s, const Region& region) {
  constexpr int CHUNKS = D / CHUNK_ELEMENTS, ITEMS = SPAN_2 * CHUNKS, PITCH = Row<D>::PITCH;
  constexpr bool REGULAR = 32 % CHUNKS == 0, SAME_PLACE = REGULAR && 32 / CHUNKS % 8 == 0;  // in a turn; in its slot
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int length = region.length[2] - region.key[2];
  // Copies of keys that the map lacks write zeros and read nothing; they name the lane's first key, or the last one.
  base += static_cast<long long>(smaller(lane / CHUNKS, length - 1)) * s.step[2] + lane % CHUNKS * CHUNK_ELEMENTS;
#pragma unroll 1
  for (int row = warp; row < SPAN_0 * SPAN_1; row += THREADS / 32) {
    const int x0 = SPAN_0 == 1 ? 0 : row / SPAN_1, x1 = row - x0 * SPAN_1;
    const bool inside = region.key[0] + x0 < region.length[0] && region.key[1] + x1 < region.length[1];
    const int slot = x0 * SLOT_PLANE + x1 * SLOT_ROW + lane / CHUNKS, rest = inside ? length - lane / CHUNKS : 0;
    const Element* source = base + (inside ? s.offset(x0, x1, 0) : 0);
    const unsigned target = shared + slot * PITCH + (SAME_PLACE ? Row<D>::chunk(slot, lane % CHUNKS) : 0);
#pragma unroll
    for (int first = 0; first < ITEMS; first += 32) {
      if (first + 32 > ITEMS && first + lane >= ITEMS) break;
      if (REGULAR) {
        const int x2 = first / CHUNKS;
        const int place = SAME_PLACE ? 0 : Row<D>::chunk(slot + x2, lane % CHUNKS);
        cp_async_16(target + x2 * PITCH + place, source + static_cast<long long>(x2 < rest ? x2 : 0) * s.step[2],
                    x2 < rest);
      } else {
        const int x2 = (first + lane) / CHUNKS - lane / CHUNKS, c = (first + lane) % CHUNKS;
        cp_async_16(target + x2 * PITCH + Row<D>::chunk(slot + x2, c),
                    source + (x2 < rest ? static_cast<long long>(x2) * s.step[2] + (c - lane % CHUNKS) * CHUNK_ELEMENTS
                                        : 0),
                    x2 < rest);
      }
    }
  }
}

// How a warp's lanes share the rows of a tile: in turn `i`, one chunk each.
template <int D>
struct Share {
  static constexpr int CHUNKS = D / CHUNK_ELEMENTS, TURNS = (16 * CHUNKS + 31) / 32;
  static constexpr bool REGULAR = 32 % CHUNKS == 0;  // turn i is turn 0, some whole rows on
  int first[REGULAR ? 1 : TURNS];                    // elements from the tile's first

  __device__ __forceinline__ Share(const Layout& s, int lane) {
#pragma unroll
    for (int i = 0; i < (REGULAR ? 1 : TURNS); ++i) first[i] = rows(s, row(i, lane)) + chunk(i, lane) * CHUNK_ELEMENTS;
  }
  __device__ __forceinline__ int offset(const Layout& s, int i) const {
    return REGULAR ? first[0] + rows(s, i * 32 / CHUNKS) : first[REGULAR ? 0 : i];
  }
  static __device__ __forceinline__ int rows(const Layout& s, int row) {
    return static_cast<int>(s.offset(row_axis(0, row), row_axis(1, row), row_axis(2, row)));
  }
  static __device__ __forceinline__ int row(int i, int lane) { return (32 * i + lane) / CHUNKS; }
  static __device__ __forceinline__ int chunk(int i, int lane) { return (32 * i + lane) % CHUNKS; }
  static __device__ __forceinline__ bool has(int i, int lane) {
    return 32 * i + 32 <= 16 * CHUNKS || row(i, lane) < 16;
  }
  static __device__ __forceinline__ int place(int i, int lane) {  // bytes in the tile's stage
    return row(i, lane) * Row<D>::PITCH + Row<D>::chunk(row(i, lane), chunk(i, lane));
  }
};

// A tile of queries, from `base`, the tile's first, to its stage; rows outside the map become zeros.
__device__ __forceinline__ void load_tile(unsigned stage, const Element* base, const Layout& s,
                                          const Share<HEAD_DIM>& share, const Tile& tile, int lane) {
#pragma unroll
  for (int i = 0; i < Share<HEAD_DIM>::TURNS; ++i)
    if (share.has(i, lane)) {
      const bool present = tile.whole || tile.inside(share.row(i, lane));
      cp_async_16(stage + share.place(i, lane), base + (present ? share.offset(s, i) : 0), present);
    }
}

// A tile of outputs from its stage.
__device__ __forceinline__ void store_tile(Element* base, const unsigned char* stage, const Layout& s,
                                           const Share<HEAD_DIM_V>& share, const Tile& tile, int lane) {
#pragma unroll
  for (int i = 0; i < Share<HEAD_DIM_V>::TURNS; ++i)
    if (share.has(i, lane) && (tile.whole || tile.stores(share.row(i, lane))))
      *reinterpret_cast<uint4*>(base + share.offset(s, i)) =
          *reinterpret_cast<const uint4*>(stage + share.place(i, lane));
}
