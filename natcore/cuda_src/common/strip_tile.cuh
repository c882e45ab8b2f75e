// A warp's tile: its columns, where its operands lie in shared memory, and how its results are stored.
#pragma once

#include "common/block_products.cuh"
#include "common/strips.cuh"

// A warp's tile within a run: its first column, the first that it stores, the one after the last, and its kind.
struct Tile {
  int x, owned, end, kind;
  bool exists;
  __device__ __forceinline__ Tile(const Run& run, int number) {
    const int length = run.length[1];
    x = run.start + smaller(number * TILE, larger(smaller(STRIP, length) - TILE, 0));
    owned = PADDED ? run.owned : number * TILE;
    exists = owned < length && x + TILE > owned;
    end = smaller(x + TILE, length);
    const int others = larger(owned - x, 0) / GROUP_COLUMNS;  // groups of another tile
    if (occurs(NARROW) && others == GROUPS - 1) {
      kind = NARROW, x += others * GROUP_COLUMNS;
    } else {
      kind = !is_clamped(length) ? INNER : !occurs(AT_END) || x + x + TILE <= length ? AT_START : AT_END;
    }
  }
  // Whether windows near it are.
  __device__ __forceinline__ bool is_clamped(int length) const {
    if (STRIDE_1 > 1) return true;
    const int left = CAUSAL_1 ? KERNEL_1 - 1 : KERNEL_1 / 2;
    if (!OWN_KEYS) return x < left || x + TILE - 1 - left + KERNEL_1 > length;
    // Keys less than a window away from a border are seen by clamped windows too.
    const int margin = CAUSAL_1 ? 0 : KERNEL_1, first = x - LEFT;
    return x < margin || x + TILE > length - margin || first < 0 || first + blocks_of(INNER) * BLOCK_COLUMNS > length;
  }
  __device__ __forceinline__ int groups() const { return occurs(NARROW) && kind == NARROW ? 1 : GROUPS; }
  __device__ __forceinline__ int group(int g) const { return x + g * GROUP_COLUMNS; }
  // The first column of group g's first block away from borders; of KEYS, near borders, that of all groups. The blocks
  // of tiles of one group of queries stay inside the map.
  __device__ __forceinline__ int block(int g, int length) const {
    if (OWN_KEYS && kind != INNER) {
      const int start = seen_by(1, x, length).start;
      const int blocks = kind == NARROW ? blocks_of(NARROW) : kind == AT_END ? blocks_of(AT_END) : blocks_of(AT_START);
      return PADDED ? start : smaller(start, COLUMNS - blocks * BLOCK_COLUMNS);
    }
    return !OWN_KEYS && GROUPS == 1 ? larger(smaller(x - LEFT, length - BLOCKS * BLOCK_COLUMNS), 0) : group(g) - LEFT;
  }
  // Whether a column of the tile is this tile's to store.
  __device__ __forceinline__ bool owns(int column) const {
    return static_cast<unsigned>(x + column - owned) < static_cast<unsigned>(end - owned);
  }
};

// Where this lane's token of a tile's first block lies in a ring of rows, for each step: row i of the band's list, or a
// masked copy of its last row. `first` is the ring row of row 0 of the map, give or take the ring's length.
template <typename Rows, int STEPS>
__device__ __forceinline__ void find_seen(unsigned (&at)[STEPS], unsigned ring, int byte, const Interval& rows, int i,
                                          int first) {
  const int y = smaller(rows.start + i, rows.end - 1), place = y + first;
  const unsigned row = ring + (place < SEEN_ROWS ? place : place - SEEN_ROWS) * Rows::PITCH;
#pragma unroll
  for (int step = 0; step < STEPS; ++step) at[step] = row + Rows::at(byte + step * 32, y);
}

// The 8 tokens of a group as B operands, times `factor`; `row` and `byte` are where token lane % 8 lies.
template <typename Rows, int STEPS>
__device__ __forceinline__ void load_own(unsigned (&b)[2 * STEPS], unsigned row, int byte, float factor, int lane) {
#pragma unroll
  for (int step = 0; step < STEPS; step += 2) {
    unsigned r[4];
    const int chunk = smaller(step * 32 + lane / 8 * 16, STEPS * 32 - 16);
    ldmatrix_x4(r, row + Rows::at(byte + chunk, lane % 8 % BAND));
#pragma unroll
    for (int i = 0; i < 4 && 2 * step + i < 2 * STEPS; ++i) b[2 * step + i] = r[i];
  }
  if (factor != 1.f) {
#pragma unroll
    for (unsigned& pair : b) pair = pack<Element>(factor * low<Element>(pair), factor * high<Element>(pair));
  }
}

// C, 16 x 8, of which C^T would be wanted: its two halves as a B operand.
__device__ __forceinline__ void as_operand(unsigned (&b)[2], const float (&c)[4]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) b[h] = movmatrix_transposed(pack<Element>(c[2 * h], c[2 * h + 1]));
}

// Results of a group, elements of the head x 8 tokens, times `factor` of each of a lane's two tokens, into 8 rows of
// the warp's stage.
template <int STEPS>
__device__ __forceinline__ void stage_group(unsigned char* stage, const float (&o)[STEPS][4], const float (&factor)[2],
                                            int lane) {
  unsigned r[STEPS][2];
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int h = 0; h < 2; ++h) r[step][h] = pack<Element>(o[step][2 * h] * factor[0], o[step][2 * h + 1] * factor[1]);
#if __CUDA_ARCH__ >= 900
  const int token = lane % 8;
  const unsigned row = shared_address(stage) + token * OutRows::PITCH;
#pragma unroll
  for (int step = 0; step < STEPS; step += 2) {
    if (step + 1 < STEPS)
      stmatrix_x4_transposed(row + OutRows::chunk(token, 2 * step + lane / 8),
                             {r[step][0], r[step][1], r[step + 1][0], r[step + 1][1]});
    else
      stmatrix_x2_transposed(row + OutRows::chunk(token, 2 * step + lane / 8 % 2), r[step]);
  }
#else
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<unsigned*>(stage + lane / 4 * OutRows::PITCH + OutRows::chunk(lane / 4, 2 * step + h) +
                                   lane % 4 * 4) =
          movmatrix_transposed(r[step][h]);
#endif
}

// What a lane stores of a group in its warp's stage: 16 bytes of some tokens' vectors of D elements.
template <int D>
struct Stores {
  static constexpr int CHUNKS = D / 8, COUNT = (8 * CHUNKS + 31) / 32;
  int lane, offset[COUNT];

  __device__ __forceinline__ int token(int i) const { return (lane + 32 * i) / CHUNKS; }
  __device__ __forceinline__ Stores(const Layout& s, int its_lane) : lane(its_lane) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      offset[i] = token(i) % BAND * s.step[0] + token(i) / BAND * s.step[1] + (lane + 32 * i) % CHUNKS * 8;
  }
  // Group g of a tile to `target`, where the tile's first row and column lie; `rows` of them are in the map.
  __device__ __forceinline__ void write(Element* target, const Layout& s, const unsigned char* stage, int g,
                                        const Tile& tile, int rows) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (lane + 32 * i < 8 * CHUNKS && token(i) % BAND < rows &&
          tile.owns(g * GROUP_COLUMNS + token(i) / BAND))
        *reinterpret_cast<uint4*>(target + g * GROUP_COLUMNS * s.step[1] + offset[i]) =
            *reinterpret_cast<const uint4*>(stage + token(i) * OutRows::PITCH +
                                            OutRows::chunk(token(i), (lane + 32 * i) % CHUNKS));
  }
};
