// Copies of the tiled backward between global and shared memory or registers.
#pragma once

#include "common/tiled_boxes.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/store.cuh"

// What nobody writes later are zeros: elements beyond a head's, sums, kinds and flags.
__device__ __forceinline__ void clear_shared(unsigned char* shared) {
  for (int i = threadIdx.x; i < SHARED_BYTES / 16; i += THREADS)
    reinterpret_cast<uint4*>(shared)[i] = uint4{0, 0, 0, 0};
}

// Vectors of COUNT elements of a row of slots, by lanes or threads of these numbers. Slots from `columns` on become
// zeros. (The number of a row's first slot is a multiple of 8.)
template <int COUNT, int PADDED>
__device__ __forceinline__ void load_row(unsigned target, const Element* source, int step, int columns, int number) {
  constexpr int CHUNKS = COUNT / 8;
#pragma unroll 8
  for (int i = number; i < SPAN_2 * CHUNKS; i += SPAN_1 == 1 ? THREADS : 32) {
    const int column = static_cast<unsigned>(i) / CHUNKS, chunk = static_cast<unsigned>(i) % CHUNKS;
    const bool present = column < columns;
    cp_async_16(target + column * Rows<PADDED>::PITCH + Rows<PADDED>::chunk(column, chunk),
                source + (present ? column * step + chunk * 8 : 0), present);
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
      const int slot = row * SPAN_2, within = row < rows ? columns : 0;
      load_row<HEAD_DIM, D>(target + slot * D_PITCH, of_d + row * d.step[1], d.step[2], within, lane);
      load_row<HEAD_DIM_V, V>(target + SEEN_V_AT + slot * V_PITCH, of_v + row * v.step[1], v.step[2], within, lane);
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
  constexpr int CHUNKS = COUNT / 8;
#pragma unroll
  for (int first = 0; first < 16 * CHUNKS; first += 32) {
    const int i = first + lane, token = i / CHUNKS, chunk = i % CHUNKS;
    if (first + 32 > 16 * CHUNKS && i >= 16 * CHUNKS) break;
    const bool present = tile.inside(token);
    cp_async_16(target + token * Rows<PADDED>::PITCH + Rows<PADDED>::chunk(token, chunk),
                base + (present ? Tile::offset(s, token) + chunk * 8 : 0), present);
  }
}

// Own vectors as A operands, multiplied by `factor`.
template <int PADDED>
__device__ __forceinline__ void read_own(unsigned (&a)[PADDED / 16][4], unsigned source, float factor, int lane) {
#pragma unroll
  for (int step = 0; step < PADDED / 16; ++step) {
    const int chunk = Rows<PADDED>::chunk(lane % 16, 2 * step + lane / 16);
    ldmatrix_x4(a[step], source + lane % 16 * Rows<PADDED>::PITCH + chunk);
    if (factor != 1.f) {
#pragma unroll
      for (unsigned& pair : a[step]) pair = pack<Element>(factor * low<Element>(pair), factor * high<Element>(pair));
    }
  }
}

// Four lanes have a row's 8 words of four n8 tiles, two elements each; afterwards lane t has all of tile t.
__device__ __forceinline__ void transpose_quad(unsigned (&r)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const unsigned received = __shfl_xor_sync(~0u, upper ? r[i] : r[i + bit], bit);
      (upper ? r[i] : r[i + bit]) = received;
    }
  }
}

// A result of a tile, times `factor`, to `base`, where its first token lies.
template <int COUNT, int PADDED>
__device__ __forceinline__ void store_result(Element* base, const Layout& s, const Tile& tile,
                                             const float (&result)[PADDED / 8][4], float factor, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int token = lane / 4 + 8 * h;
    const bool stored = tile.stores(token);
    Element* target = base + Tile::offset(s, token);
#pragma unroll
    for (int first = 0; first < PADDED / 8; first += 4) {
      unsigned r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = first + i < PADDED / 8 ? first + i : first;
        r[i] = pack<Element>(result[n][2 * h] * factor, result[n][2 * h + 1] * factor);
      }
      transpose_quad(r, lane);
      const int chunk = first + lane % 4;
      if (stored & (chunk < COUNT / 8)) store_16(target + chunk * 8, r);
    }
  }
}
