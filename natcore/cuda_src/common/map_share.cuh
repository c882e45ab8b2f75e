// What a block owns that takes whole maps, one after another.
//
// The map of one (batch entry, head, dilation group) has two axes. All positions are in-group (see window.cuh). Rows of
// queries come in bands of two.
//
// Defines: ELEMENT, RPB (undefined = no bias), HEAD_DIM, HEAD_DIM_V, WARPS; and for a = 0, 1: KERNEL_a, STRIDE_a,
// CAUSAL_a, DILATION_a.
#pragma once

#include "common/anew.cuh"
#include "common/elements.cuh"
#include "common/scale.cuh"
#include "common/shared_rows.cuh"
#include "common/two_axes.cuh"
#include "ptx/ldmatrix.cuh"

constexpr int BAND = 2, CHUNKS = 4, TOKEN = 64;  // chunks of 8 elements of a token in shared memory, and its bytes
constexpr int THREADS = 32 * WARPS;

static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM <= 32 && HEAD_DIM_V % 8 == 0 && HEAD_DIM_V <= 32, "tokens of 64 bytes");

// ---- sizes and strides: written by natcore/planning/resident.py ----

struct Sizes {
  int extent[2], batch, slices;  // a block takes every slices-th batch entry
};

// What a block owns: a head of queries, blockIdx.x, of the maps of a dilation group and slice of the batch, blockIdx.y.
struct Share {
  int group[2], length[2], slice;

  __device__ __forceinline__ explicit Share(const Sizes& sizes) {
    int rest = blockIdx.y;
    group[1] = rest % DILATION_1;
    rest /= DILATION_1;
    group[0] = rest % DILATION_0;
    slice = rest / DILATION_0;
    length[0] = group_length({sizes.extent[0], 1, 1, DILATION_0, 0}, group[0]);
    length[1] = group_length({sizes.extent[1], 1, 1, DILATION_1, 0}, group[1]);
  }
  // Where the map of a batch entry starts: found anew each time, as registers are few.
  template <typename T>
  __device__ __forceinline__ T* base(T* pointer, const Layout& s, int entry, int head = blockIdx.x) const {
    return pointer + (entry * s.batch + static_cast<long long>(head) * s.head + anew(group[0]) * s.axis[0] +
                      anew(group[1]) * s.axis[1]);
  }
  __device__ __forceinline__ bool has(int row, int column) const { return row < length[0] && column < length[1]; }
  // The first row of keys that a band sees, of 8 at most.
  __device__ __forceinline__ int start_of(int band) const {
    return keys_of(window_of(0), smaller(band * BAND, length[0] - 1), length[0]).start;
  }
};
