// Sums of dS for drpb: in registers for as long as a warp's bands look alike, then in a table of the warp.
#pragma once

#include "common/strips.cuh"

// A register of dS holds the same difference key - query in every band whose keys start alike, and in all groups of a
// tile. `table` is the warp's own: ENTRIES floats, and one that lanes read whose sums are of no entry.
struct BiasSums {
  // Columns that go to the table at once are so far apart: those of a group's tokens differ by less. Three at most.
  static constexpr int APART = (BLOCKS * BLOCK_COLUMNS + 3 * GROUP_COLUMNS - 1) / (3 * GROUP_COLUMNS) * GROUP_COLUMNS;
  static constexpr int NONE = -(1 << 20);
  float sum[BLOCKS][4] = {};
  int first_row = NONE;      // of keys, relative to the band; at first such that no sum is of an entry
  int first_column = -LEFT;  // of keys, relative to the group

  // Only tiles of one group, whose blocks stay inside the map, differ in this.
  __device__ __forceinline__ int column() const { return GROUPS > 1 ? -LEFT : first_column; }

  // Makes the sums those of a band whose keys start `its_row` rows and `its_column` columns after it.
  __device__ __forceinline__ void turn_to(int its_row, int its_column, float* table, int lane) {
    if (first_row == its_row && (GROUPS > 1 || first_column == its_column)) return;
    flush(table, lane);
    first_row = its_row, first_column = its_column;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[b][i] = 0.f;
  }

  // Adds the sums to the table: at a time as many as are of different entries in all lanes. Keys that a band lacks have
  // sums of zero.
  __device__ __forceinline__ void flush(float* table, int lane) const {
#pragma unroll 1
    for (int turn = 0; turn < BAND / 2; ++turn) {
#pragma unroll
      for (int part = 0; part < 2 * APART; ++part) {
        const int e = part % 2, query = lane % 4 * 2 + e;
        const auto column_of = [](int b, int h) { return b * BLOCK_COLUMNS + (TALL ? 0 : h); };
        const auto entry = [&](int b, int h) {
          const int y = first_row + lane / 4 + (TALL ? 8 * h : 0) - query % BAND + KERNEL_0 - 1;
          const int x = column() + column_of(b, h) - query / BAND + KERNEL_1 - 1;
          const bool exists = query % BAND / 2 == turn && 0 <= y && y < TABLE_ROWS && 0 <= x && x < COLUMN_DIFFERENCES;
          return exists ? y * COLUMN_DIFFERENCES + x : ENTRIES;
        };
        float total[BLOCKS][2];
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            if (column_of(b, h) % APART == part / 2) total[b][h] = table[entry(b, h)] + sum[b][2 * h + e];
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            if (column_of(b, h) % APART == part / 2 && entry(b, h) < ENTRIES) table[entry(b, h)] = total[b][h];
        __syncwarp();
      }
    }
  }
};
