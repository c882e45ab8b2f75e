// Keys that roll through a block's warps while it marches down a map: how tokens are grouped, where they lie, and who
// works on what.
//
// The map of one (batch entry, head, dilation group) has two axes. All positions are in-group (see window.cuh).
//
//   group   2 x 4 queries: the n8 side of an mma. Where keys' gradients are made, token n lies in row n / 4, column
//           n % 4, so that the two tokens of a lane share their row
//   band    two rows of queries. A block works on one after the other
//   pair    two columns of keys, from column -SHIFT on: a warp's, for good. What a band sees of it, 8 rows at most, is
//           a block of 16 keys: the m16 side. Key m of it lies in column m / 8, and in the row whose slot is m % 8
//   slot    rows of keys are counted from map to map: row r of a block's m-th map, of `bands` bands, is row
//           2 bands m + r. Its slot is that modulo 8. So a row keeps its slot, and the registers in which a warp sums
//           its gradients, for as long as bands see it; then the row 8 further on has it
//
//   kernel 7: what a band (q) sees, and the slots of its 8 rows      row 0  . . . . . . .
//                                                                        1  k k k k k k k    1
//                                                                        2  k k k k k k k    2
//                                                                        3  k k k k k k k    3
//                                                                        4  k k q q k k k    4
//                                                                        5  k k q q k k k    5
//                                                                        6  k k k k k k k    6
//                                                                        7  k k k k k k k    7
//                                                                        8  k k k k k k k    0
//                                                                        9  . . . . . . .    1: after the next band
//
// Queries that see a pair lie in some neighbouring groups, of which each warp has its own: from its first such query
// on.
//
// Defines: those of map_share.cuh, COLUMNS (of the longest dilation group), SHIFT, PAIRS, MOST_GROUPS (of queries that
// see a pair), FIRST_INNER and END_INNER (pairs near which no window is clamped), SEEN_PAIRS (of a group of queries
// that starts at a multiple of 4), LEAD (pairs of rows of keys that a band needs beside its own and those above),
// OFFSET (of the first row of keys that most bands see, from the band's first), AHEAD (bands that are on their way),
// RING (rows of keys), BLOCKS_PER_SM.
#pragma once

#include "common/map_share.cuh"
#include "common/resident_stores.cuh"
#include "ptx/mbarrier.cuh"

constexpr int GROUP_COLUMNS = 4, BLOCK_ROWS = 8, BLOCK_COLUMNS = 2;
constexpr int STEPS = 2;  // of a token: 16 elements each
constexpr int GROUPS = (COLUMNS + GROUP_COLUMNS - 1) / GROUP_COLUMNS, QUERIES = GROUPS * 8;  // of a band
constexpr int OWN_RING = AHEAD + 2;  // bands of queries
constexpr int TABLES = PAIRS - (END_INNER - FIRST_INNER) + 1;

static_assert(WARPS == PAIRS + 1, "a warp for each pair, and one that copies");
static_assert(RING % 2 == 0, "rows come in pairs");
static_assert(AHEAD >= 2, "scalars of the band after the next one are made meanwhile");

// ---- shared memory, in bytes ----

// Keys and values: rows of PITCH bytes, of which each 128 hold a pair, their chunks permuted by the slot, so that 8
// rows miss each other's banks. Columns that the map lacks are zeros.
constexpr int PITCH = PAIRS * BLOCK_COLUMNS * TOKEN;
__device__ __forceinline__ int key_place(int slot, int column, int chunk) {
  return ((column + SHIFT) * TOKEN + chunk * 16) ^ slot * 16;
}
// Queries, output gradients and outputs of a band: 8 tokens of a group after each other, and so any 4 columns.
__device__ __forceinline__ int query_place(int row, int column, int chunk) {
  return (column * BAND + row) * TOKEN + (chunk ^ column % 4) * 16;
}
// dS of a band: of each query 8 places for pairs, of each two columns of 8 slots of keys. A pair has place pair % 8 of
// the queries in its groups; others are zeros for good.
constexpr int WEIGHTS_TOKEN = 256;
__device__ __forceinline__ int weights_place(int row, int column, int pair, int key_column) {
  const int token = column * BAND + row;
  return token * WEIGHTS_TOKEN + ((pair % 8 * 2 + key_column) ^ token % 8) * 16;
}

// The bias tables, in units of 1 / scale, of the pairs between FIRST_INNER and END_INNER together, of every other one:
// a row for each difference of rows, key - query, then 8 of infinities, of which a lane takes the one that misses other
// lanes' banks; within a row, for both columns of keys, a column of the pair's groups each, with infinities for those
// that do not see it.
constexpr int TABLE_ROWS = 2 * KERNEL_0 - 1, COLUMN_DIFFERENCES = 2 * KERNEL_1 - 1;
constexpr int ENTRIES = TABLE_ROWS * COLUMN_DIFFERENCES;
constexpr int TABLE_COLUMNS = MOST_GROUPS * GROUP_COLUMNS;
constexpr int TABLE_ROW = (2 * TABLE_COLUMNS + 3) / 8 * 8 + 4;  // 8 rows of 4 lie in 32 banks
constexpr int TABLE = (TABLE_ROWS + 8) * TABLE_ROW;
__device__ __forceinline__ int table_of(int pair) {
  return pair < FIRST_INNER ? pair : pair < END_INNER ? FIRST_INNER : pair - (END_INNER - FIRST_INNER) + 1;
}

// Of a query and its neighbour to the right: log2(e) lse, and what dP starts from, d_lse - delta.
struct alignas(16) Scalars {
  float lse[2], start[2];
};

constexpr int K_AT = 0, V_AT = RING * PITCH;
constexpr int BAND_BYTES = QUERIES * TOKEN, OWN = 3 * BAND_BYTES;  // of a tensor; of Q, dO and O
constexpr int Q_AT = 2 * V_AT, G_AT = Q_AT + BAND_BYTES, O_AT = G_AT + BAND_BYTES;
constexpr int WEIGHTS_AT = Q_AT + OWN_RING * OWN, WEIGHTS = QUERIES * WEIGHTS_TOKEN;  // two bands
// What bands near the first and last rows add to sums of drpb: differences of rows that others lack (see Sums).
constexpr int SUMS = MOST_GROUPS * 4, SUMS_BYTES = BIASED ? SUMS * 32 * 4 : 0;  // registers; bytes of a warp
constexpr int RARE_AT = WEIGHTS_AT + 2 * WEIGHTS;
constexpr int CLEARED = RARE_AT + PAIRS * SUMS_BYTES;  // all before that starts as zeros
constexpr int GIVEN_AT = CLEARED, GIVEN = 2 * QUERIES * 4;  // lse and d_lse of a band
constexpr int SCALARS_AT = GIVEN_AT + OWN_RING * GIVEN, SCALARS = QUERIES * 16;  // two bands
constexpr int TABLES_AT = SCALARS_AT + 2 * SCALARS;
// By which results reach 16-byte stores: of keys' gradients two rows of a column each, of dV and of dK.
constexpr int STAGE_COLUMN = 2 * TOKEN + 16, STAGE = 4 * STAGE_COLUMN;  // these 16 bytes keep columns off their banks
constexpr int STAGES_AT = TABLES_AT + TABLES * TABLE * 4;
constexpr int JOBS_AT = STAGES_AT + PAIRS * STAGE;    // of each group of queries and lane, struct QueryJob
constexpr int FIRSTS_AT = JOBS_AT + GROUPS * 32 * 16;  // of each pair, the first column of queries
constexpr int BARRIER_AT = (FIRSTS_AT + PAIRS * 4 + 7) / 8 * 8;
// Of each band: the rows of the bias table for its queries' rows and the 8 rows of keys from the first it sees on; and,
// after all of these, that first one, and one after the last band's, twice as many as there are bands.
constexpr int ROWS_AT = BARRIER_AT + 8, ROWS_OF_BAND = BAND * BLOCK_ROWS;
static_assert(2 * PAIRS * SUMS_BYTES <= WEIGHTS_AT || !BIASED, "sums lie there in the end");

// ---- who works on what ----

// The queries that see a pair: `groups` groups from column `first` on. None where the map lacks both columns.
struct PairQueries {
  int first, groups;

  __device__ __forceinline__ PairQueries(int pair, int length) {
    const int column = pair * BLOCK_COLUMNS - SHIFT, last = smaller(column + 1, length - 1);
    first = groups = 0;
    if (column >= length) return;
    first = queries_of(window_of(1), larger(column, 0), length).start;
    groups = (queries_of(window_of(1), last, length).end - first + GROUP_COLUMNS - 1) / GROUP_COLUMNS;
    first = smaller(first, length - groups * GROUP_COLUMNS);
  }
};

// A band of queries among all that a block works on: its first row, the first row of keys that it sees, and where that
// one is in the ring and among the slots.
struct Band {
  int row, start, ring, slot;

  // Goes on to a band that sees rows from `by` rows further on.
  __device__ __forceinline__ void advance(int by) {
    ring += by;
    if (ring >= RING) ring -= RING;
    slot = (slot + by) & (BLOCK_ROWS - 1);
  }
  // How many rows after the first one is the one that has a slot.
  __device__ __forceinline__ int rows_to(int its_slot) const { return (its_slot - slot) & (BLOCK_ROWS - 1); }
  // Where the row with this slot lies in the ring; for one that the map lacks, its last row.
  __device__ __forceinline__ int place_of(int its_slot, int length) const {
    const unsigned place = ring + smaller(rows_to(its_slot), length - 1 - start);
    return (place < RING ? place : place - RING) * PITCH;
  }
};

// The barrier of all warps. Its first phase ends when everything is prepared, its second when the first two bands'
// scalars are there, and each further one when all dS of a band is there, and the scalars of the next one, and what the
// one after that needs has been copied.
struct Step {
  unsigned barrier;
  __device__ __forceinline__ void arrive(int lane) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barrier);
  }
  __device__ __forceinline__ void wait(unsigned phase) const { mbarrier_wait(barrier, phase % 2); }
};
