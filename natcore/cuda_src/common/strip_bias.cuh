// The bias and the mask of the marching forward: what S starts from.
//
// A lane reads the bias table at the row of its pair's difference, or at the row of infinities where the query's
// window lacks the key's row. Columns that a window lacks are masked by the table of unclamped windows or, in tiles
// where windows are clamped, by one more product: [key in column c] times [query lacks column c] * -3e38.
#pragma once

#include "common/scale.cuh"
#include "common/strips.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"

// Both tables of the block's heads, by its consumers. Loads come first, all at once: nothing hides their latency.
__device__ __forceinline__ void fill_tables(float* tables, const BiasElement* rpb, const Layout& s, float factor) {
  constexpr int COLUMN_DIFFERENCES = 2 * KERNEL_1 - 1, ENTRIES = HEADS * TABLE_ROWS * COLUMN_DIFFERENCES;
  constexpr int WORKERS = 32 * CONSUMERS, LOADS = (ENTRIES + WORKERS - 1) / WORKERS;
  const auto head_of = [](int i) { return i / (TABLE_ROWS * COLUMN_DIFFERENCES); };
  const auto row_of = [](int i) { return i / COLUMN_DIFFERENCES % TABLE_ROWS; };
  const auto column_of = [](int i) { return i % COLUMN_DIFFERENCES; };
  float bias[LOADS] = {};
#ifdef RPB
#pragma unroll
  for (int n = 0; n < LOADS; ++n) {
    const int i = threadIdx.x + n * WORKERS;
    if (i < ENTRIES) bias[n] = widen(rpb[head_of(i) * s.head + row_of(i) * s.axis[0] + column_of(i) * s.axis[1]]);
  }
#endif
  for (int i = threadIdx.x; i < HEADS * 2 * TABLE; i += WORKERS) tables[i] = __int_as_float(0xff800000);
  named_barrier_sync(1, WORKERS);
#pragma unroll
  for (int n = 0; n < LOADS; ++n) {
    const int i = threadIdx.x + n * WORKERS, difference = column_of(i) + 1 - KERNEL_1;
    if (i >= ENTRIES || difference < LEAST_DIFFERENCE || difference > GREATEST_DIFFERENCE) continue;
    float* entry = tables + head_of(i) * (2 * TABLE) + row_of(i) * TABLE_ROW + difference - LEAST_DIFFERENCE;
    const int first = CAUSAL_1 ? 1 - KERNEL_1 : -(KERNEL_1 / 2);
    if (first <= difference && difference < first + KERNEL_1) entry[0] = bias[n] * factor;
    entry[TABLE] = bias[n] * factor;
  }
  named_barrier_sync(1, WORKERS);
}

// The columns of its blocks that query lane / 4 of a group at `x` lacks, as a B operand; `block` is where they start.
__device__ __forceinline__ void lacking(unsigned (&b)[2], int x, int block, int length, int lane) {
  const Interval seen = keys_of(window_of(1), smaller(x + lane / 4 / BAND, length - 1), length);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    b[h] = 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = block + 8 * h + lane % 4 * 2 + e;
      if (column < seen.start || column >= seen.end) b[h] |= 0xff7fu << 16 * e;
    }
  }
}

// S += mask of one block, by a product in bfloat16, whatever the elements.
__device__ __forceinline__ void mask_columns(float (&s)[4], int block, const unsigned (&lacks)[2], int lane) {
  unsigned a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // rows lane / 4 + 8 (i % 2), columns 2 (lane % 4) + 8 (i / 2) and the next one
    const int column = block * BLOCK_COLUMNS + (BLOCK_ROWS == 8 ? i % 2 : 0) - 8 * (i / 2);
    a[i] = column / 2 == lane % 4 && column >= 0 ? (column % 2 ? 0x3f800000u : 0x3f80u) : 0u;
  }
  Mma<bfloat16>::m16n8k16(s, a[0], a[1], a[2], a[3], lacks[0], lacks[1], s);
}
