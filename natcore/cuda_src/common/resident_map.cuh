// Maps that fit into the shared memory of a block: what a block owns, and how its maps get there.
//
// The map of one (batch entry, head, dilation group) has two axes, of at most 16 rows and 16 columns. All positions are
// in-group (see window.cuh). Rows of queries come in bands of two; half a band, up to 8 columns, is a warp's.
//
// Defines: ELEMENT, RPB (undefined = no bias), HEAD_DIM, HEAD_DIM_V, ROWS and COLUMNS (of the longest dilation group),
// WARPS; and for a = 0, 1: KERNEL_a, STRIDE_a, CAUSAL_a, DILATION_a.
#pragma once

#include "common/map_share.cuh"
#include "ptx/cp_async.cuh"

constexpr int BANDS = (ROWS + BAND - 1) / BAND, HALVES = (COLUMNS + 7) / 8, WORKERS = BANDS * HALVES;  // warps

static_assert(ROWS <= 16 && COLUMNS <= 16, "lanes have columns of keys");
static_assert(WORKERS <= WARPS, "half a band is a warp's");

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
