// The bias and the mask of the marching kernels: what S starts from.
//
// A lane reads the bias table at the row of its pair's difference, or at the row of infinities where the query's
// window lacks the key's row. Columns that a window lacks are masked by the table of unclamped windows or, in tiles
// where windows are clamped, by one more product: [seen token in column c] times [own token lacks column c] * -3e38.
#pragma once

#include "common/anew.cuh"
#include "common/scale.cuh"
#include "common/strip_tile.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"

// Both tables of the block's heads, by its consumers. Loads come first, all at once: nothing hides their latency.
__device__ __forceinline__ void fill_tables(float* tables, const BiasElement* rpb, const Layout& s, float factor) {
  constexpr int WORKERS = 32 * CONSUMERS, LOADS = (HEADS * ENTRIES + WORKERS - 1) / WORKERS;
  const auto head_of = [](int i) { return i / ENTRIES; };
  const auto row_of = [](int i) { return i / COLUMN_DIFFERENCES % TABLE_ROWS; };
  const auto column_of = [](int i) { return i % COLUMN_DIFFERENCES; };
  float bias[LOADS] = {};
#ifdef RPB
#pragma unroll
  for (int n = 0; n < LOADS; ++n) {
    const int i = threadIdx.x + n * WORKERS;
    if (i < HEADS * ENTRIES)
      bias[n] = widen(rpb[head_of(i) * s.head + row_of(i) * s.axis[0] + column_of(i) * s.axis[1]]);
  }
#endif
  for (int i = threadIdx.x; i < HEADS * 2 * TABLE; i += WORKERS) tables[i] = __int_as_float(0xff800000);
  named_barrier_sync(1, WORKERS);
#pragma unroll
  for (int n = 0; n < LOADS; ++n) {
    const int i = threadIdx.x + n * WORKERS, of_keys = column_of(i) + 1 - KERNEL_1;  // key - query
    const int row = OWN_KEYS ? TABLE_ROWS - 1 - row_of(i) : row_of(i), difference = OWN_KEYS ? -of_keys : of_keys;
    if (i >= HEADS * ENTRIES || difference < LEAST_DIFFERENCE || difference > GREATEST_DIFFERENCE) continue;
    float* entry = tables + head_of(i) * (2 * TABLE) + row * TABLE_ROW + difference - LEAST_DIFFERENCE;
    const int first = CAUSAL_1 ? 1 - KERNEL_1 : -(KERNEL_1 / 2);
    if (first <= of_keys && of_keys < first + KERNEL_1) entry[0] = bias[n] * factor;
    entry[TABLE] = bias[n] * factor;
  }
  named_barrier_sync(1, WORKERS);
}

// The columns of its blocks that token lane / 4 of a group at `x` lacks, of the four of a lane's B operands; `block` is
// where they start. Element e of operand h is bit 16 e + h.
__device__ __forceinline__ unsigned lacking(int x, int block, int length, int lane) {
  const Interval seen = seen_by(1, smaller(x + lane / 4 / BAND, length - 1), length);
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = block + 8 * (i / 2) + lane % 4 * 2 + i % 2;
    if (column < seen.start || column >= seen.end) bits |= 1u << (16 * (i % 2) + i / 2);
  }
  return bits;
}

// Those of all groups of a tile, two bits each; of tiles away from borders, none.
__device__ __forceinline__ unsigned lacking(const Tile& tile, int length, int lane) {
  unsigned bits = 0;
  if (tile.kind != INNER) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) bits |= lacking(tile.group(g), tile.block(g, length), length, lane) << 2 * g;
  }
  return bits;
}

// The B operands of such bits: -3e38 in bfloat16 where a column is lacked.
__device__ __forceinline__ void as_masks(unsigned (&b)[GROUPS][2], unsigned bits) {
#pragma unroll
  for (int i = 0; i < 2 * GROUPS; ++i) b[i / 2][i % 2] = (bits >> i & 0x10001u) * 0xff7fu;
}

// Where this lane's pairs find their bias, kept from one inner band of a run to the next.
struct BiasRows {
  const float* at[2][2];  // of own token e of the lane's two and half h of a block, in the first block's first column
  bool inner = false;

  // Makes them those of a band and seen tokens of `rows`; `table` is that of the tile.
  __device__ __forceinline__ void turn_to(const Run& run, int band, const Interval& rows, const float* table,
                                          int lane) {
    const bool still = inner;
    inner = run.is_inner(band);
    if (still && inner) return;
    const int y = band * BAND, length = run.length[0];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int own = smaller(y + (lane % 4 * 2 + e) % BAND, length - 1);  // rows below the map repeat its last one
      const Interval seen = seen_by(0, own, length);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int other = rows.start + lane / 4 + (TALL ? 8 * h : 0);
        const int row = seen.start <= other && other < seen.end ? other - own + KERNEL_0 - 1 : MASKED_ROW;
        at[e][h] = table - lane % 4 * 2 / BAND + row * TABLE_ROW + (TALL ? 0 : h);
      }
    }
  }
};

// S += mask of one block, by a product in bfloat16, whatever the elements. A block's columns are in the first 8 or in
// the last 8 of all.
__device__ __forceinline__ void mask_columns(float (&s)[4], int block, const unsigned (&lacks)[2], int lane) {
  const int first = block * BLOCK_COLUMNS;
  unsigned a[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {  // rows lane / 4 + 8 h, columns 2 (lane % 4) and the next one
    const int column = first % 8 + (TALL ? 0 : h);
    a[h] = column / 2 == lane % 4 ? (column % 2 ? 0x3f800000u : 0x3f80u) : 0u;
  }
  Mma<bfloat16>::m16n8k8(s, a[0], a[1], lacks[first / 8], s);
}
