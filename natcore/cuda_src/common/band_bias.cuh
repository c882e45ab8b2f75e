// The bias and the mask of the banded backward: one table for both, and the sums of drpb.
//
// S starts from bias / unit. A lane reads the table at its query's variant, which masks columns, and at the row
// of its pair's difference, or at the row of infinities where the query lacks the key's row.
#pragma once

#include "common/bands.cuh"
#include "common/scale.cuh"

__device__ __forceinline__ void fill_table(float* table, const BiasElement* rpb, const Layout& s, float unit) {
  const float masked = copysignf(positive_infinity(), -unit), factor = 1.f / unit;
  for (int i = threadIdx.x; i < KERNEL_2 * TABLE_VARIANT; i += THREADS) {
    const int start = -(i / TABLE_VARIANT), row = i / TABLE_ROW % (MASKED_ROW + 1);
    const int difference = i % TABLE_ROW + LEAST_DIFFERENCE, end = CAUSAL_2 ? 1 : start + KERNEL_2;
    float x = masked;
    if (row < TABLE_ROWS && start <= difference && difference < end) {
      x = 0.f;
#ifdef RPB
      x = factor * widen(rpb[row / ROW_DIFFERENCES * s.axis[0] + row % ROW_DIFFERENCES * s.axis[1] +
                             (difference + KERNEL_2 - 1) * s.axis[2]]);
#endif
    }
    table[i] = x;
  }
}

// Of a query's column: its variant's place in the table, in floats.
__device__ __forceinline__ int variant_of(int x, int length) {
  x = smaller(larger(x, 0), length - 1);  // overhanging columns are masked by their scalars
  return (x - keys_of(window_of(2), x, length).start) * TABLE_VARIANT;
}

// The table row of a pair; the masked one where the query's window lacks the key's row.
__device__ __forceinline__ int table_row(const Region& region, int q0, int q1, int k0, int k1) {
  const Interval seen = keys_of(window_of(1), q1, region.length[1]);
  const bool sees = q1 < region.length[1] && seen.start <= k1 && k1 < seen.end;
  return sees ? (k0 - q0 + KERNEL_0 - 1) * ROW_DIFFERENCES + k1 - q1 + KERNEL_1 - 1 : MASKED_ROW;
}

// Sums of dS, one for each element of a unit that holds the same difference key - query, over the tiles of a warp for
// as long as their bands look alike.
constexpr int SUMS = DENSE ? GROUPS * QUERY_BLOCKS : QUERY_BLOCKS;
__device__ constexpr int sum_of(int block, int group) {
  return DENSE ? group * QUERY_BLOCKS + block : block - group * STEP;
}

struct BiasSums {
  float sum[SUMS][4] = {};
  int plane = 0, row = 0, rows = 0;  // the list's first row relative to the band's, its rows
  int count = -1;                    // all its rows; -1: nothing yet
  int first = 0;                     // row block

  // Makes the sums those of row block `block` of a band; sums of another kind go to the warp's table.
  __device__ __forceinline__ void turn_to(const Band<QUERY_LIST>& band, int block, float* table) {
    if (plane == band.plane && row == band.row && rows == band.rows && count == band.count && first == block) return;
    flush(table);
    plane = band.plane, row = band.row, rows = band.rows, count = band.count, first = block;
#pragma unroll
    for (int u = 0; u < SUMS; ++u)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[u][i] = 0.f;
  }
  // Adds dS of one unit, whose block starts `column` columns after the group, to the warp's table. Lanes with the
  // same difference take turns.
  __device__ __forceinline__ void add(const float (&ds)[4], int column, float* table, int lane) const {
#pragma unroll
    for (int turn = 0; turn < BAND / 2; ++turn) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = lane % 4 * 2 + i % 2, at = first + lane / 4 + (ROW_HALVES == 2 ? 8 * (i / 2) : 0);
        const int d0 = KERNEL_0 == 1 ? 0 : plane + at / rows + KERNEL_0 - 1;
        const int d1 = row + (KERNEL_0 == 1 ? at : at % rows) - token % BAND + KERNEL_1 - 1;
        const int d2 = column + (ROW_HALVES == 2 ? 0 : i / 2) - token / BAND + KERNEL_2 - 1;
        if (at < count && token % BAND / 2 == turn && 0 <= d0 && d0 < 2 * KERNEL_0 - 1 && 0 <= d1 &&
            d1 < ROW_DIFFERENCES && 0 <= d2 && d2 < COLUMN_DIFFERENCES)
          table[(d0 * ROW_DIFFERENCES + d1) * COLUMN_DIFFERENCES + d2] += ds[i];
        __syncwarp();
      }
    }
  }
  // Adds the sums to the warp's table.
  __device__ __forceinline__ void flush(float* table) const {
    if (count < 0) return;
    const int lane = lane_here();
#pragma unroll
    for (int u = 0; u < SUMS; ++u)
      add(sum[u], u % QUERY_BLOCKS * BLOCK_COLUMNS - u / QUERY_BLOCKS * GROUP_COLUMNS - QUERY_LEFT, table, lane);
  }
};
