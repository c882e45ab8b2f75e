// Bias, masks and the sums of drpb of the tiled backward.
//
// Scores start from a table of differences key - query, in units of 1 / scale. In the first of a head's tables what
// lies outside an unclamped window is -infinity, on axes of which a tile has several tokens; on others its box is exact.
// The weights of tiles that are not plain start from the second, and are cleared by masks.
#pragma once

#include "common/scale.cuh"
#include "common/tiled_boxes.cuh"

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

// Seen minus own is key - query or its opposite.
constexpr int SIGN = OWN_KEYS ? -1 : 1;
// Steps in the table from an element of the scores to others: the lane's next column, its second token, the second n8
// side of a step, and the next step.
constexpr int NEXT_COLUMN = SIGN, SECOND_TOKEN = -SIGN * (HALF_ROWS * TABLE_ROW + HALF_COLUMNS);
constexpr int SECOND_SIDE = SIGN * (STEP_ROWS == 2 ? TABLE_ROW : 8);
constexpr int NEXT_STEP = SIGN * (STEP_ROWS == 2 ? 2 * TABLE_ROW : 16);

__device__ __forceinline__ void fill_tables(float* table, const BiasElement* rpb, const Layout& s, float factor) {
#pragma unroll 2  // nothing else hides the latency of its loads
  for (int i = threadIdx.x; i < TABLE; i += THREADS) {
    const int at[3] = {i / TABLE_PLANE, i / TABLE_ROW % DIFFERENCES_1, i % TABLE_ROW};
    bool entry = true, seen = true;
    long long offset = 0;
#pragma unroll
    for (int a = 0; a < 3; ++a) {
      const int difference = at[a] + first_difference_of(a), last = kernel_of(a) - 1;
      entry = entry && -last <= difference && difference <= last;
      const int first = causal_of(a) ? -last : -(kernel_of(a) / 2);
      if (tile_of(a) > 1) seen = seen && first <= difference && difference < first + kernel_of(a);
      offset += static_cast<long long>(difference + last) * s.axis[a];
    }
    float bias = 0.f;
#ifdef RPB
    if (entry) bias = widen(rpb[offset]) * factor;
    table[TABLE + i] = bias;
#endif
    table[i] = seen ? bias : negative_infinity();
  }
}

// Where own token lane / 4 and the seen token at (0, 0, 2 (lane % 4)) lie in a table, on axes 1 and 2; `plane` is
// seen - own.
__device__ __forceinline__ int table_offset(const Tile& tile, int plane, int lane) {
  const int token = lane / 4, column = lane % 4 * 2;
  return (SIGN * plane - FIRST_DIFFERENCE_0) * TABLE_PLANE +
         (-SIGN * (tile.first[1] + Tile::row_of(token)) - FIRST_DIFFERENCE_1) * TABLE_ROW +
         SIGN * (column - tile.first[2] - Tile::column_of(token)) - FIRST_DIFFERENCE_2;
}

// What a lane's two own tokens see of the box, on axes 1 and 2; nothing where they lie outside the map.
struct Sight {
  unsigned rows[2], columns[2];  // the start, from the box's, and 2^16 times the length
  __device__ __forceinline__ void look(const Tile& tile, const Region& region, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = lane / 4 + 8 * h;
      const int y = tile.first[1] + Tile::row_of(token), x = tile.first[2] + Tile::column_of(token);
      const bool inside = y < region.length[1] && x < region.length[2];
      const Interval of_y = seen_by(1, smaller(y, region.length[1] - 1), region.length[1]);
      const Interval of_x = seen_by(2, smaller(x, region.length[2] - 1), region.length[2]);
      rows[h] = inside ? of_y.start - tile.rows.start + (of_y.end - of_y.start) * 65536 : 0;
      columns[h] = inside ? of_x.start - tile.columns.start + (of_x.end - of_x.start) * 65536 : 0;
    }
  }
};
// All bits where token `x` of the box is seen, else none.
__device__ __forceinline__ unsigned mask_of(unsigned seen, int x) {
  return x - (seen & 0xffff) < seen >> 16 ? ~0u : 0;
}

// ---- drpb ----
//
// dS of a pair goes to a float of the lane that made it, in the warp's own part of shared memory, where the pairs of a
// plane, line and step meet again in every tile whose box starts alike: tiles of one kind. The pair of rows g and g + 8
// of a step with n8 sides that differ alike share a float. When a warp comes to a tile of another kind, and at the end,
// all threads of the block add up what lies there, each its entries, in a fixed order.

constexpr int ENTRIES = (2 * KERNEL_0 - 1) * (2 * KERNEL_1 - 1) * (2 * KERNEL_2 - 1);
constexpr int SIDES = TILE_2 == 4 ? 2 : 1;  // n8 sides from one that row g sees to the one alike of row g + 8

struct Kind {
  int start[3];  // of the box, from the tile's first token
  __device__ __forceinline__ Kind(const Tile& tile, const Region& region) {
    start[0] = region.planes.start - region.owned[0];
    start[1] = tile.rows.start - tile.first[1], start[2] = tile.columns.start - tile.first[2];
  }
};
__device__ __forceinline__ int* kind_of(unsigned char* shared, int warp) {
  return reinterpret_cast<int*>(shared + KINDS_AT) + warp * 4;
}
__device__ __forceinline__ float4* sums_of(unsigned char* shared, int warp) {
  return reinterpret_cast<float4*>(shared + SUMS_AT + warp * SUMS);
}

// Sums of the n8 sides of a line of steps. `at` is the lane's place of the first step.
struct LineSums {
  float4* at;
  float carried[2 * SIDES] = {};  // of row g, from the step before

  __device__ __forceinline__ explicit LineSums(float4* place) : at(place) {}
  __device__ __forceinline__ void add(const float (&ds)[2][4]) {
    float4 sum = *at;
    if (SIDES == 2) {
      sum.x += carried[0] + ds[0][2], sum.y += carried[1] + ds[0][3];
      sum.z += carried[2 * SIDES - 2] + ds[1][2], sum.w += carried[2 * SIDES - 1] + ds[1][3];
      carried[0] = ds[0][0], carried[1] = ds[0][1];
    } else {
      sum.x += carried[0] + ds[0][2], sum.y += carried[1] + ds[0][3];
      sum.z += ds[0][0] + ds[1][2], sum.w += ds[0][1] + ds[1][3];
    }
    carried[2 * SIDES - 2] = ds[1][0], carried[2 * SIDES - 1] = ds[1][1];
    *at = sum;
    at += 32;
  }
  __device__ __forceinline__ void finish() {
    float4 sum = *at;
    sum.x += carried[0], sum.y += carried[1];
    if (SIDES == 2) sum.z += carried[2 * SIDES - 2], sum.w += carried[2 * SIDES - 1];
    *at = sum;
  }
};

// Adds the sums of all warps to the block's partial sums, [ENTRIES], or begins them. Between two barriers.
__device__ __forceinline__ void add_sums(float* partials, unsigned char* shared, bool begin) {
#pragma unroll 1
  for (int i = threadIdx.x; i < ENTRIES; i += THREADS) {
    constexpr int WIDTH = 2 * KERNEL_2 - 1, HEIGHT = 2 * KERNEL_1 - 1;
    const int d0 = i / (WIDTH * HEIGHT) - (KERNEL_0 - 1), d1 = i / WIDTH % HEIGHT - (KERNEL_1 - 1);
    const int d2 = i % WIDTH - (KERNEL_2 - 1);
    float sum = 0.f;
#pragma unroll 1
    for (int warp = 0; warp < WARPS; ++warp) {
      const int* kind = kind_of(shared, warp);
      const float* sums = reinterpret_cast<const float*>(shared + SUMS_AT + warp * SUMS);
      const int plane = d0 - kind[0];
      if (plane < 0 || plane >= PLANES) continue;
#pragma unroll
      for (int token = 0; token < 8; ++token) {
        const int y = d1 + Tile::row_of(token) - kind[1], x = d2 + Tile::column_of(token) - kind[2];
        // The n8 side, in a line, that the token sees there, and the column within it.
        const int line = STEP_ROWS == 2 ? x >> 3 : y, side = (STEP_ROWS == 2 ? y : x >> 3) + SIDES;
        if (line < 0 || line >= LINES || side < 0 || side >= 2 * (STEPS + 1)) continue;
        const int lane = token * 4 + (x & 7) / 2;
        sum += sums[(((plane * LINES + line) * (STEPS + 1) + side / 2) * 32 + lane) * 4 + side % 2 * 2 + (x & 1)];
      }
    }
    partials[i] = begin ? sum : partials[i] + sum;
  }
}
