// Groups of 8 tokens, strips of the map down which a block marches, and what it keeps in shared memory.
//
// The map has two axes: axis 0 counts rows, axis 1 columns. All positions are in-group (see window.cuh). There are
// three passes. In the forward and in the backward of queries (PASS = FORWARD, QUERIES) the own tokens of a warp are
// queries, and the seen ones their keys; in the backward of keys (KEYS) it is the other way round.
//
//   group    BAND x GROUP_COLUMNS = 8 own tokens: the n8 side of an mma. Token n of a group lies in row n % BAND,
//            column n / BAND, so the two tokens of a lane share their column.
//   block    BLOCK_ROWS x BLOCK_COLUMNS = 16 seen tokens: the m16 side of an mma. What a band of queries sees is one
//            row of blocks; keys near a border are seen by more queries, in several rows of blocks.
//   tile     GROUPS neighbouring groups of one band, which share the blocks they load: what a warp works on
//   strip    TILES tiles side by side. Every warp of a block has a tile and a head, and keeps them on its way down.
//
//   kernel 7x7, BAND 2, blocks 8 x 2         k k|k k|k k|k k|k k
//                                            k k|k k|k k|k k|k k
//   a group of queries and its five          k k|k k|k k|k k|k k
//   blocks of keys; the next group is        k k|k q|q q|q k|k k
//   two blocks to the right, so that a       k k|k q|q q|q k|k k
//   tile of two groups has seven blocks      k k|k k|k k|k k|k k
//                                            k k|k k|k k|k k|k k
//                                            k k|k k|k k|k k|k k
//
// Rows of seen tokens lie in a ring of RING stages of BAND rows: rows [s BAND - SHIFT, (s + 1) BAND - SHIFT) of the
// map are the s-th stage, so that what most bands see starts where a stage starts. Own tokens have a ring of OWN_RING
// bands. A token has two vectors: of HEAD_DIM elements (d: q or k) and of HEAD_DIM_V (v: v or dO; queries of the
// forward have none; those of the backward also have o, of HEAD_DIM_V). A strip of several is PADDED with zeros where
// it leaves the map; the row of a strip as wide as the map holds COLUMNS, all of it, and where blocks leave these there
// is a GAP of zeros between rows. The mask removes both: what it removes has a weight of 0, and 0 times NaN is NaN.
//
// Near a border windows are clamped: fewer blocks hold what a group of queries sees, more of them what a group of keys
// does. So a tile is of one of four kinds, by which each of its groups takes other blocks.
//
// Defines: PASS, ELEMENT, RPB (undefined = no bias), HEAD_DIM, HEAD_DIM_V; BAND, BLOCK_ROWS, GROUPS, TILES, HEADS (of
// a block), BLOCKS (of a group away from borders), LEFT (columns from a group's first block to its first own token, at
// most), INNER_BLOCKS, START_BLOCKS, END_BLOCKS and NARROW_BLOCKS (of each group, the first block of the tile's that it
// takes, and the one after the last; of kinds that do not occur, zeros), COLUMNS (of shared memory), PAD (of these,
// left of a padded strip) and MARGIN (columns by which blocks leave these at most, on either side), LEAST_DIFFERENCE
// and GREATEST_DIFFERENCE (of columns, seen - own), PADDED, WIDTH (columns of the narrowest map, of strips that
// are not padded; else 0), SHIFT, RING, OWN_RING, PRODUCERS (warps), BLOCKS_PER_SM; and for a = 0, 1: KERNEL_a, STRIDE_a,
// CAUSAL_a, DILATION_a.
#pragma once

#include "common/elements.cuh"
#include "common/shared_rows.cuh"
#include "common/turn.cuh"
#include "common/two_axes.cuh"

constexpr int FORWARD = 0, QUERIES = 1, KEYS = 2;  // values of PASS
constexpr bool OWN_KEYS = PASS == KEYS;
constexpr int GROUP_COLUMNS = 8 / BAND, BLOCK_COLUMNS = 16 / BLOCK_ROWS;
constexpr bool TALL = BLOCK_ROWS == 16;
constexpr int STEP = GROUP_COLUMNS / BLOCK_COLUMNS;  // blocks from one group's first to the next one's
constexpr int TILE = GROUPS * GROUP_COLUMNS, STRIP = TILES * TILE;  // columns
constexpr int CONSUMERS = HEADS * TILES, THREADS = 32 * (CONSUMERS + PRODUCERS);
constexpr int D_STEPS = (HEAD_DIM + 15) / 16, V_STEPS = (HEAD_DIM_V + 15) / 16;  // of 16 elements

static_assert(GROUP_COLUMNS % BLOCK_COLUMNS == 0, "groups start where blocks start");
static_assert(HEAD_DIM % 8 == 0 && HEAD_DIM_V % 8 == 0, "rows are whole 16-byte chunks");

// ---- kinds of tiles ----

constexpr int INNER = 0;     // no window near it is clamped: only these need no mask
constexpr int AT_START = 1;  // others, nearer to the map's first column
constexpr int AT_END = 2;    // nearer to its last
constexpr int NARROW = 3;    // of the last group only: the others are another tile's

__device__ constexpr int range_of(int kind, int i) {
  constexpr int RANGES[4][2 * GROUPS] = {{INNER_BLOCKS}, {START_BLOCKS}, {END_BLOCKS}, {NARROW_BLOCKS}};
  return RANGES[kind][i];
}
// Whether a group of a tile of this kind takes the tile's block; whether any does; how many there are.
__device__ constexpr bool takes(int kind, int group, int block) {
  return range_of(kind, 2 * group) <= block && block < range_of(kind, 2 * group + 1);
}
__device__ constexpr bool is_taken(int kind, int block) {
  for (int g = 0; g < GROUPS; ++g)
    if (takes(kind, g, block)) return true;
  return false;
}
__device__ constexpr int blocks_of(int kind) {
  int most = 0;
  for (int g = 0; g < GROUPS; ++g) most = most < range_of(kind, 2 * g + 1) ? range_of(kind, 2 * g + 1) : most;
  return most;
}
__device__ constexpr bool occurs(int kind) { return blocks_of(kind) > 0; }
__device__ constexpr int groups_of(int kind) { return kind == NARROW && occurs(NARROW) ? 1 : GROUPS; }

// Calls Work::run<KIND>(its...) for a tile's kind.
template <typename Work, typename... Its>
__device__ __forceinline__ void of_kind(int kind, Its&... its) {
  if (occurs(NARROW) && kind == NARROW) {
    if constexpr (occurs(NARROW)) Work::template run<NARROW>(its...);
  } else if (occurs(AT_END) && kind == AT_END) {
    if constexpr (occurs(AT_END)) Work::template run<AT_END>(its...);
  } else if (occurs(AT_START) && (!occurs(INNER) || kind == AT_START)) {
    if constexpr (occurs(AT_START)) Work::template run<AT_START>(its...);
  } else if constexpr (occurs(INNER)) {
    Work::template run<INNER>(its...);
  }
}

static_assert(BLOCKS * BLOCK_COLUMNS <= 16 && blocks_of(AT_START) * BLOCK_COLUMNS <= (OWN_KEYS ? 16 : 1 << 30) &&
                  blocks_of(AT_END) * BLOCK_COLUMNS <= (OWN_KEYS ? 16 : 1 << 30),
              "the mask's product has 16 columns");

// ---- shared memory, in bytes ----

constexpr int MOST_STEPS = D_STEPS > V_STEPS ? D_STEPS : V_STEPS;
constexpr int GAP = (MARGIN * HEADS * MOST_STEPS * 32 + 127) / 128 * 128;  // of zeros, before and after each seen row

// The chunks of 16 bytes of a row of seen tokens are permuted by the map's row, within each 128 bytes, so that 8 rows
// of a column miss each other's banks wherever in the ring they lie; rows whose blocks do not start at 128 bytes are an
// odd number of chunks apart instead. Chunks of own tokens are permuted such that a group's 8 miss each other's.
template <int STEPS>  // of 16 elements of a head
struct SeenRows {
  static constexpr int TOKEN = HEADS * STEPS * 32, BLOCK = BLOCK_COLUMNS * TOKEN;
  static constexpr bool PERMUTED = BLOCK % 128 == 0;
  // Columns that are copied: before a gap whole blocks, whose chunks mix.
  static constexpr int COPIED = PERMUTED && MARGIN > 0 ? (COLUMNS - 1) / BLOCK_COLUMNS * BLOCK_COLUMNS + BLOCK_COLUMNS
                                                       : COLUMNS;
  static constexpr int BYTES = COPIED * TOKEN;
  static constexpr int PITCH = PERMUTED ? (BYTES + 127) / 128 * 128 + GAP : ((BYTES + GAP) / 16 | 1) * 16;
  static __device__ __forceinline__ int at(int byte, int row) { return PERMUTED ? byte ^ (row & 7) * 16 : byte; }
};
using SeenD = SeenRows<D_STEPS>;
using SeenV = SeenRows<V_STEPS>;

template <int STEPS>
struct OwnRows {
  static constexpr int TOKEN = HEADS * STEPS * 32, PITCH = (STRIP * TOKEN + 127) / 128 * 128;
  static constexpr int LINES = TOKEN > 128 ? TOKEN / 128 : 1;  // of a token
  static __device__ __forceinline__ int at(int byte, int row) {
    return byte ^ (row % BAND + BAND * (static_cast<unsigned>(byte) / 128 / LINES)) % 8 * 16;
  }
};
using OwnD = OwnRows<D_STEPS>;
using OwnV = OwnRows<V_STEPS>;

// The bias table of one head, in units of 1 / scale: a row for each difference of rows, seen - own, then a row of
// infinities for queries that lack the key's row; within a row, differences of columns from LEAST_DIFFERENCE on. The
// first of two tables holds infinities where an unclamped window lacks the column too.
constexpr int TABLE_ROWS = 2 * KERNEL_0 - 1;
// Where a band's rows fill a block, the row that a query lacks is one beyond its window: modulo 8, there.
constexpr int MASKED_ROW = TABLE_ROWS + ((2 * KERNEL_0 - KERNEL_0 / 2 - 1) % 8 + 8 - TABLE_ROWS % 8) % 8;
constexpr int TABLE_ROW = (GREATEST_DIFFERENCE - LEAST_DIFFERENCE + 4) / 8 * 8 + 4;  // 8 rows of 4 lie in 32 banks
constexpr int TABLE = (MASKED_ROW + 1) * TABLE_ROW;
constexpr int COLUMN_DIFFERENCES = 2 * KERNEL_1 - 1, ENTRIES = TABLE_ROWS * COLUMN_DIFFERENCES;  // of rpb

// By which results reach 16-byte stores: rows of a tile, or of one group where there are two results.
constexpr int OUT_STEPS = PASS == FORWARD ? V_STEPS : PASS == QUERIES ? D_STEPS : MOST_STEPS;
constexpr int STAGED = OWN_KEYS ? 1 : GROUPS;  // groups
using OutRows = Rows<OUT_STEPS * 16>;
constexpr int OUT_STAGE = STAGED * 8 * OutRows::PITCH;

constexpr int SEEN_ROWS = RING * BAND;
constexpr int SEEN_D_AT = GAP, SEEN_V_AT = SEEN_D_AT + SEEN_ROWS * SeenD::PITCH;
constexpr int OWN_D_AT = SEEN_V_AT + SEEN_ROWS * SeenV::PITCH;
constexpr int OWN_V_AT = OWN_D_AT + OWN_RING * BAND * OwnD::PITCH;
constexpr int OWN_O_AT = OWN_V_AT + (PASS == FORWARD ? 0 : OWN_RING * BAND * OwnV::PITCH);  // QUERIES
constexpr int OUT_AT = OWN_O_AT + (PASS == QUERIES ? OWN_RING * BAND * OwnV::PITCH : 0);
constexpr int TABLE_AT = OUT_AT + CONSUMERS * OUT_STAGE;
constexpr int SCALARS_AT = TABLE_AT + HEADS * 2 * TABLE * 4;
// KEYS: {lse, d_lse - delta} of seen queries; 8 rows of two words miss each other's banks. QUERIES: lse of own ones,
// then d_lse.
constexpr int SCALARS_ROW = 4 * (OWN_KEYS ? (2 * HEADS * COLUMNS + 3) / 8 * 8 + 4 : HEADS * STRIP);
constexpr int SUMS_AT =
    SCALARS_AT + SCALARS_ROW * (OWN_KEYS ? SEEN_ROWS : PASS == QUERIES ? 2 * OWN_RING * BAND : 0);
constexpr int SUMS = ENTRIES + 1;  // of a warp: drpb, and one for sums that are of no entry
#ifdef RPB
constexpr int SUMS_BYTES = PASS == QUERIES ? CONSUMERS * SUMS * 4 : 0;
#else
constexpr int SUMS_BYTES = 0;
#endif
// Backward: what a warp keeps of its run, PLACE bytes, and each of its lanes, KEPT bytes, because registers are scarce.
constexpr int PLACES_AT = (SUMS_AT + SUMS_BYTES + 15) / 16 * 16, PLACE = PASS == FORWARD ? 0 : 32;
constexpr int KEPT_AT = PLACES_AT + CONSUMERS * PLACE, KEPT = PASS == FORWARD ? 0 : PASS == KEYS ? 4 : 16;
constexpr int BARRIERS_AT = KEPT_AT + CONSUMERS * 32 * KEPT;
constexpr int SHARED_BYTES = BARRIERS_AT + 2 * (RING + OWN_RING) * 8;

// ---- sizes and strides: written by natcore/planning/marching.py ----

struct Sizes {
  int extent[2], batch, heads_per_kv;
  int bands, strips;       // of the longest dilation group
  int head_groups, slices;  // blocks that share HEADS heads
};

// What an own token sees, on one axis.
__device__ __forceinline__ Interval seen_by(int a, int x, int length) {
  return OWN_KEYS ? queries_of(window_of(a), x, length) : keys_of(window_of(a), x, length);
}

// The items of a slice: equal shares, the first ones one longer where they do not divide. There are less than 2^31.
__device__ __forceinline__ Interval share_of(const Sizes& sizes, int slice) {
  const unsigned items = static_cast<unsigned>(sizes.batch) * DILATION_0 * DILATION_1 * sizes.strips * sizes.bands;
  const int each = items / sizes.slices, longer = items % sizes.slices;
  const int start = slice * each + smaller(slice, longer);
  return {start, start + each + (slice < longer ? 1 : 0)};
}

// Consecutive bands of one strip of one batch entry and dilation group. Items are numbered bands fastest.
struct Run {
  int batch, group[2], length[2];
  int start, owned;       // the strip's first column, moved back inside the map; the first that it stores
  int first, last, next;  // bands; the item after this run

  __device__ __forceinline__ Run(const Sizes& sizes, int item, int end) {
    int rest = item / sizes.bands;
    first = item - rest * sizes.bands;
    next = smaller(item + sizes.bands - first, end);
    int number = 0;
    if (PADDED) {  // there are several strips
      number = rest % sizes.strips;
      rest /= sizes.strips;
    }
    group[1] = DILATION_1 == 1 ? 0 : rest % DILATION_1;
    rest /= DILATION_1;
    group[0] = DILATION_0 == 1 ? 0 : rest % DILATION_0;
    batch = rest / DILATION_0;
    length[0] = (sizes.extent[0] - group[0] + DILATION_0 - 1) / DILATION_0;
    length[1] = (sizes.extent[1] - group[1] + DILATION_1 - 1) / DILATION_1;
    owned = number * STRIP;
    start = smaller(owned, larger(length[1] - STRIP, 0));
    last = smaller(first + next - item, (length[0] + BAND - 1) / BAND) - 1;
    if (owned >= length[1]) last = first - 1;
  }

  // Where in-group position (0, 0) lies.
  template <typename T>
  __device__ __forceinline__ T* base(T* pointer, const Layout& s, int head) const {
    return pointer + (batch * s.batch + static_cast<long long>(head) * s.head +
                      static_cast<long long>(group[0]) * s.axis[0] + static_cast<long long>(group[1]) * s.axis[1]);
  }

  // The rows that a band sees.
  __device__ __forceinline__ Interval rows_of(int band) const {
    const int y = band * BAND;
    return {seen_by(0, y, length[0]).start, seen_by(0, smaller(y + BAND, length[0]) - 1, length[0]).end};
  }
  // Whether no window of a band of queries is clamped on axis 0: all such bands see the same, relative to their row.
  __device__ __forceinline__ bool is_inner(int band) const {
    if (OWN_KEYS || STRIDE_0 > 1) return false;
    const int y = band * BAND, before = CAUSAL_0 ? KERNEL_0 - 1 : KERNEL_0 / 2;
    return y >= before && y - before + BAND - 1 + KERNEL_0 <= length[0];
  }
  // The column of the map that lies first in a row of shared memory.
  __device__ __forceinline__ int origin() const { return PADDED ? start - PAD : 0; }
};

__device__ __forceinline__ int stage_of(int row) { return static_cast<unsigned>(row + SHIFT) / BAND; }  // row >= 0

// The barriers: stages of seen rows full and empty, bands of own rows full and empty.
struct Barriers {
  unsigned base;
  __device__ __forceinline__ unsigned full(int slot) const { return base + slot * 8; }
  __device__ __forceinline__ unsigned empty(int slot) const { return base + (RING + slot) * 8; }
  __device__ __forceinline__ unsigned own_full(int slot) const { return base + (2 * RING + slot) * 8; }
  __device__ __forceinline__ unsigned own_empty(int slot) const { return base + (2 * RING + OWN_RING + slot) * 8; }
};
