// Copies of the tiled backward between global and shared memory or registers.
#pragma once

#include "common/tiled_boxes.cuh"
#include "ptx/cp_async.cuh"

// What nobody writes later are zeros: elements beyond a head's, sums, kinds and flags.
__device__ __forceinline__ void clear_shared(unsigned char* shared) {
  for (int i = threadIdx.x; i < SHARED_BYTES / 16; i += THREADS)
    reinterpret_cast<uint4*>(shared)[i] = uint4{0, 0, 0, 0};
}

// Vectors of COUNT elements of a row of slots, by lanes or threads of these numbers. Slots from `columns` on become
// zeros. (The number of a row's first slot is a multiple of 8.)
template <int COUNT, int PADDED>
__device__ __forceinline__ void load_row(unsigned target, const Element* source, int step, int columns, int number) {
  constexpr int CHUNKS = COUNT / CHUNK_ELEMENTS;
#pragma unroll 8
  for (int i = number; i < SPAN_2 * CHUNKS; i += SPAN_1 == 1 ? THREADS : 32) {
    const int column = static_cast<unsigned>(i) / CHUNKS, chunk = static_cast<unsigned>(i) % CHUNKS;
    const bool present = column < columns;
    cp_async_16(target + column * Row<PADDED>::PITCH + Row<PADDED>::chunk(column, chunk),
                source + (present ? column * step + chunk * CHUNK_ELEMENTS : 0), present);
  }
}

// A plane of a region's span, of both vectors of its tokens: the pointers are where the plane's first slot lies. Rows
// are shared out among the warps; a single row among all threads. Slots beyond the span become zeros.
__device__ __forceinline__ void load_plane(unsigned target, const Element* of_d, const Layout& d, const Element* of_v,
                                           const Layout& v, const Region& region) {
  const int lane = threadIdx.x % 32, rows = region.rows, columns = region.columns;
  if (SPAN_1 == 1) {
    load_row<HEAD_DIM, D>(target, of_d, d.step[2], columns, threadIdx.x);
    load_row<HEAD_DIM_V, V>(target + SEEN_V_AT, of_v, v.step[2], columns, threadIdx.x);
  } else {
#pragma unroll 1
    for (int row = threadIdx.x / 32; row < rows + STEP_ROWS - 1; row += WARPS) {
      const int slot = row * SPAN_2, within = row < rows ? columns : 0, source = row < rows ? row : 0;
      load_row<HEAD_DIM, D>(target + slot * D_PITCH, of_d + source * d.step[1], d.step[2], within, lane);
      load_row<HEAD_DIM_V, V>(target + SEEN_V_AT + slot * V_PITCH, of_v + source * v.step[1], v.step[2], within, lane);
    }
  }
}

// The scalars of a plane of seen queries.
__device__ __forceinline__ void load_scalars(unsigned target, const float2* source, const Layout& s,
                                             const Region& region) {
  const unsigned rows = region.rows, columns = region.columns, count = (rows + STEP_ROWS - 1) * SPAN_2;
  for (unsigned i = threadIdx.x; i < count; i += THREADS) {
    const unsigned row = i / SPAN_2, column = i % SPAN_2;
    const bool present = row < rows && column < columns;
    const int offset = row * s.step[1] + column * s.step[2];
    cp_async_small<8>(target + i * 8, source + (present ? offset : 0), present);
  }
}

// One vector of COUNT elements of each own token, the first of which lies at `base`.
template <int COUNT, int PADDED>
__device__ __forceinline__ void load_own(unsigned target, const Element* base, const Layout& s, const Tile& tile,
                                         int lane) {
  constexpr int CHUNKS = COUNT / CHUNK_ELEMENTS;
#pragma unroll
  for (int first = 0; first < 16 * CHUNKS; first += 32) {
    const int i = first + lane, token = i / CHUNKS, chunk = i % CHUNKS;
    if (first + 32 > 16 * CHUNKS && i >= 16 * CHUNKS) break;
    const bool present = tile.inside(token);
    cp_async_16(target + token * Row<PADDED>::PITCH + Row<PADDED>::chunk(token, chunk),
                base + (present ? Tile::offset(s, token) + chunk * CHUNK_ELEMENTS : 0), present);
  }
}
