// Maps that fit into the shared memory of a block: what a block owns, and how its maps get there.
//
// The map of one (batch entry, head, dilation group) has two axes, of at most 16 rows and 16 columns. All positions are
// in-group (see window.cuh). Rows of queries come in bands of two; half a band, up to 8 columns, is a warp's.
//
// Defines: ELEMENT, RPB (undefined = no bias), HEAD_DIM, HEAD_DIM_V, ROWS and COLUMNS (of the longest dilation group),
// WARPS; and for a = 0, 1: KERNEL_a, STRIDE_a, CAUSAL_a, DILATION_a.
#pragma once

#include "common/anew.cuh"
#include "common/elements.cuh"
#include "common/scale.cuh"
#include "common/shared_rows.cuh"
#include "common/two_axes.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/ldmatrix.cuh"

constexpr int BAND = 2, CHUNKS = 4, TOKEN = 64;  // chunks of 8 elements of a token in shared memory, and its bytes
constexpr int THREADS = 32 * WARPS;
constexpr int BANDS = (ROWS + BAND - 1) / BAND, HALVES = (COLUMNS + 7) / 8, WORKERS = BANDS * HALVES;  // warps

static_assert(ROWS <= 16 && COLUMNS <= 16, "lanes have columns of keys");
static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM <= 32 && HEAD_DIM_V % 8 == 0 && HEAD_DIM_V <= 32, "tokens of 64 bytes");
static_assert(WORKERS <= WARPS, "half a band is a warp's");

// ---- sizes and strides: written by natcore/planning/resident*.py ----

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

// ---- copies, by the warps that have no half band, or else by all: a thread has 16 bytes of a column's tokens ----

constexpr int SPARE = WARPS - WORKERS;
constexpr int FIRST_COPIER = 32 * SPARE >= COLUMNS * CHUNKS ? WORKERS : 0;  // a warp

template <int FIRST = FIRST_COPIER>  // the first warp of those that copy
struct Copies {
  static constexpr int ROWS_AT_ONCE = 32 * (WARPS - FIRST) / (COLUMNS * CHUNKS);  // rows
  static_assert(ROWS_AT_ONCE > 0, "a row is copied at once");
  int row, column, chunk;  // the first row

  __device__ __forceinline__ Copies() {
    const int thread = anew(threadIdx.x) - 32 * FIRST;  // what depends on it is not kept from map to map
    row = thread / (COLUMNS * CHUNKS), column = thread / CHUNKS % COLUMNS, chunk = thread % CHUNKS;
  }
  // Starts the copies of a map's tokens of D elements to `shared` and Places::at(row, column, chunk). `from` is where
  // the map starts.
  template <int D, typename Places>
  __device__ __forceinline__ void load(unsigned shared, const Element* from, const Layout& s,
                                       const Share& share) const {
    if (row >= ROWS_AT_ONCE || column >= share.length[1] || chunk >= D / 8) return;
    from += s.of(row, column) + chunk * 8;
    const int step = ROWS_AT_ONCE * s.step[0];
#pragma unroll
    for (int i = 0; i < ROWS; i += ROWS_AT_ONCE, from += step) {
      const int its = ROWS_AT_ONCE == 1 ? i : row + i;  // row is 0, then, as the compiler is to know
      if (its < share.length[0])
        cp_async_16_of_line(shared + Places::at(its, column, chunk), from);
    }
  }
};
