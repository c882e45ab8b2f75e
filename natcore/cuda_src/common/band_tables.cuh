// What the tiles of a step share, made once for all of them: see struct Tables.
#pragma once

#include "common/band_bias.cuh"

// Of a group at this column of the region: the columns that its tokens' windows, or the windows that hold its
// tokens, reach over, relative to the region.
template <bool QUERIES>
__device__ __forceinline__ Interval columns_needed(const Region& region, int column) {
  const int first = region.first[2] + column, last = smaller(first + GROUP_COLUMNS, region.length[2]) - 1;
  if (first > last) return {column, column};
  const Interval x = QUERIES ? keys_of_range(2, first, last, region.length[2])
                             : queries_of_range(2, first, last, region.length[2]);
  return {x.start - region.first[2], x.end - region.first[2]};
}

// The blocks that a group takes beyond its own [start, end): on the left, then on the right.
struct ExtraColumns {
  int left, right, first, last;
  __device__ __forceinline__ ExtraColumns(int start, int end, Interval needed)
      : left(start), right(end), first(needed.start), last(needed.end) {}
  __device__ __forceinline__ bool any() const { return left > first || right < last; }
  __device__ __forceinline__ bool next(int& column) {
    if (left > first) {
      column = left -= BLOCK_COLUMNS;
      return true;
    }
    column = right;
    right += BLOCK_COLUMNS;
    return column < last;
  }
};

// Those of a group at this column of the region.
template <bool QUERIES>
__device__ __forceinline__ ExtraColumns extra_columns(const Region& region, int column) {
  const int start = column - (QUERIES ? QUERY_LEFT : KEY_LEFT);
  const int blocks = QUERIES ? QUERY_BLOCKS : KEY_BLOCKS;
  return {start, start + blocks * BLOCK_COLUMNS, columns_needed<QUERIES>(region, column)};
}

template <bool QUERIES>
__device__ __forceinline__ bool tile_takes_extra(const Region& region, int tile) {
  bool any = false;
#pragma unroll 1
  for (int g = 0; g < GROUPS; ++g)
    any |= extra_columns<QUERIES>(region, tile * TILE_COLUMNS + g * GROUP_COLUMNS).any();
  return any;
}

// Bands of one kind, whose own rows lie in one ring and the lists' in another. Each of
// COUNT threads makes some rows.
template <bool QUERIES, int COUNT, int LIST, int OWN_RING, int RING>
__device__ __forceinline__ void fill_bands(Band<LIST>* bands, const Region& region, const Ring<OWN_RING>& own,
                                           int own_plane, const Ring<RING>& ring, int ring_plane, int thread) {
  const int* length = region.length;
#pragma unroll 1
  for (int i = thread; i < BANDS * LIST; i += COUNT) {
    const int at = i % LIST, b = i / LIST;
    Band<LIST>& band = bands[b];
    const int plane = region.first[0] + b / (REGION_1 / BAND);
    const int row = region.first[1] + b % (REGION_1 / BAND) * BAND;
    const int height = plane < length[0] ? smaller(length[1] - row, BAND) : 0;
    if (at == 0) band.height = larger(height, 0);
    if (height <= 0) continue;
    const int last = row + height - 1;
    const Interval planes = QUERIES ? keys_of_range(0, plane, plane, length[0])
                                    : queries_of_range(0, plane, plane, length[0]);
    const Interval span = QUERIES ? keys_of_range(1, row, last, length[1]) : queries_of_range(1, row, last, length[1]);
    const Rows list{planes.start, planes.end - planes.start, span.start, span.end - span.start};
    if (at == 0) {
      band.plane = list.plane - plane, band.row = list.row - row;
      band.rows = list.rows, band.count = list.count();
    }
    if (at < BAND) band.own[at] = (plane - own_plane) * OWN_RING + own.of(smaller(row + at, last));
    int p, r;
    list.at(at, p, r);
    band.slot[at] = (p - ring_plane) * RING + ring.of(r);
#pragma unroll
    for (int y = 0; y < BAND; ++y) {
      int entry = MASKED_ROW;
      if (at < list.count())
        entry = QUERIES ? table_row(region, plane, row + y, p, r) : table_row(region, p, r, plane, row + y);
      band.table[at][y] = entry * TABLE_ROW;
    }
  }
}

__device__ __forceinline__ void fill_tables(Tables& tables, const Step& step) {
  constexpr int COUNT = THREADS;
  const Region& region = step.region;
  const int key_plane = region.key_planes.start, query_plane = region.query_planes.start;
  const int thread = warp_here() * 32 + lane_here(), opposite = COUNT - 1 - thread;
  fill_bands<true, COUNT>(tables.queries, region, step.queries, query_plane, step.keys, key_plane, thread);
  fill_bands<false, COUNT>(tables.keys, region, step.keys, key_plane, step.queries, query_plane, opposite);
#pragma unroll 1
  for (int i = thread; i < QUERY_COLUMNS; i += COUNT)
    tables.column[i] =
        variant_of(region.first[2] - QUERY_PAD + i, region.length[2]) + QUERY_PAD - i - LEAST_DIFFERENCE;
#pragma unroll 1
  for (int tile = opposite; tile < TILES; tile += COUNT) {
    if (QUERY_EXTRA) tables.query_extra[tile] = tile_takes_extra<true>(region, tile);
    if (KEY_EXTRA) tables.key_extra[tile] = tile_takes_extra<false>(region, tile);
  }
}

// Rows [at, at + 2) of a band's list of slots or of places in the bias table, in one load.
__device__ __forceinline__ void load_pair(int (&pair)[2], const unsigned short* at) {
  const unsigned both = *reinterpret_cast<const unsigned*>(at);
  pair[0] = both & 0xffff, pair[1] = both >> 16;
}
