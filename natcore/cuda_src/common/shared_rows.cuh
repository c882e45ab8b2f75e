// Rows of elements in shared memory that ldmatrix reads without bank conflicts.
#pragma once

// Rows of D elements in shared memory, eight of which, at numbers that differ modulo 8, hold a chunk
// each in different banks. Rows of 2, 4, 8, ... chunks permute them; others have an odd number of chunks.
// BYTES of an element.
template <int D, int BYTES = 2>
struct Rows {
  static constexpr int CHUNKS = D * BYTES / 16;
  static constexpr bool PERMUTED = CHUNKS > 1 && (CHUNKS & (CHUNKS - 1)) == 0;
  static constexpr int PITCH = (PERMUTED ? CHUNKS : CHUNKS | 1) * 16;  // bytes
  // Bytes from the row's start to its c-th chunk.
  static __device__ __forceinline__ int chunk(int row, int c) {
    return (PERMUTED ? c ^ (CHUNKS >= 8 ? row & 7 : row % 8 / (8 / CHUNKS)) : c) * 16;
  }
};
