// Sums of dS for drpb: in registers for as long as a warp's bands look alike, then in a table of the warp.
#pragma once

#include "common/strips.cuh"

// A register of dS holds the same difference key - query in every band whose keys start alike, and in all groups of a
// tile. `table` is the warp's own, ENTRIES floats.
struct BiasSums {
  float sum[BLOCKS][4] = {};
  int kind = 0;  // the first key relative to the band (high bits), rows of keys (low byte); 0: no sums
  int first_column = -LEFT;  // of keys, relative to the group

  // Only tiles of one group, whose blocks stay inside the map, differ in this.
  __device__ __forceinline__ int column() const { return GROUPS > 1 ? -LEFT : first_column; }

  // Makes the sums those of a band whose keys start `its_row` rows and `its_column` columns after it.
  __device__ __forceinline__ void turn_to(int its_row, int its_rows, int its_column, float* table, int lane) {
    const int its_kind = its_row * 256 + its_rows;
    if (kind == its_kind && (GROUPS > 1 || first_column == its_column)) return;
    flush(table, lane);
    kind = its_kind, first_column = its_column;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[b][i] = 0.f;
  }

  // Adds the sums to the table. Lanes with the same difference take turns.
  __device__ __forceinline__ void flush(float* table, int lane) const {
    const int row = kind >> 8, rows = kind & 255;
#pragma unroll 1
    for (int turn = 0; turn < BAND / 2; ++turn) {
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int query = lane % 4 * 2 + i % 2, key = lane / 4 + (TALL ? 8 * (i / 2) : 0);
          const int y = row + key - query % BAND + KERNEL_0 - 1;
          const int x = column() + b * BLOCK_COLUMNS + (TALL ? 0 : i / 2) - query / BAND + KERNEL_1 - 1;
          if (key < rows && query % BAND / 2 == turn && 0 <= y && y < TABLE_ROWS && 0 <= x && x < COLUMN_DIFFERENCES)
            table[y * COLUMN_DIFFERENCES + x] += sum[b][i];
          __syncwarp();
        }
      }
    }
  }
};
