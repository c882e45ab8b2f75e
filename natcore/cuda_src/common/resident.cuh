// Maps that fit into the shared memory of a block: how tokens are grouped, where they lie, and who works on what.
//
// The map of one (batch entry, head, dilation group) has two axes, of at most 16 rows and 16 columns. All positions are
// in-group (see window.cuh).
//
//   group   2 x 4 queries: the n8 side of an mma. Token n lies in row n % 2, column n / 2, so that the two tokens of a
//           lane share their column
//   band    two rows of queries, GROUPS groups
//   half    two neighbouring groups of a band: what a warp works on
//   pair    two columns of keys, from column -SHIFT on. What a band sees of it, 8 rows at most, is a block of 16 keys:
//           the m16 side. A block's key m lies in row m % 8, column m / 8
//   unit    a group and a pair of which it sees something: a tile of scores. Which units there are is known when
//           compiling; they are worked on in PHASES of AT_ONCE pairs
//
// Defines: ELEMENT, RPB (undefined = no bias), HEAD_DIM, HEAD_DIM_V, ROWS and COLUMNS (of the longest dilation group),
// SHIFT, PAIRS, FIRST_PAIRS and END_PAIRS (of group g, the 4 bits from 4 g on), AT_ONCE, WARPS, BLOCKS_PER_SM; and for
// a = 0, 1: KERNEL_a, STRIDE_a, CAUSAL_a, DILATION_a.
#pragma once

#include "common/resident_map.cuh"

constexpr int GROUP_COLUMNS = 4, BLOCK_ROWS = 8, BLOCK_COLUMNS = 2;
constexpr int STEPS = 2;  // of a token: 16 elements each
constexpr int PHASES = (PAIRS + AT_ONCE - 1) / AT_ONCE;
constexpr int GROUPS = (COLUMNS + GROUP_COLUMNS - 1) / GROUP_COLUMNS;

static_assert(PAIRS <= 8, "a column of keys is one side of an mma");
static_assert(HALVES == (GROUPS + 1) / 2, "two groups each");

// ---- units ----

__device__ constexpr int first_pair(int group) { return static_cast<unsigned>(FIRST_PAIRS) >> 4 * group & 15; }
__device__ constexpr int end_pair(int group) { return static_cast<unsigned>(END_PAIRS) >> 4 * group & 15; }
__device__ constexpr bool is_unit(int group, int pair) { return first_pair(group) <= pair && pair < end_pair(group); }
// Of each pair, 8 bits: the first group that sees something of it, how many do (windows move with their queries, so
// they are neighbours), and the units of its phase before its own. Constants, as loops would be left to run time.
__device__ constexpr unsigned long long of_pairs(int what) {
  unsigned long long all = 0;
  for (int pair = 0, before = 0; pair < PAIRS; ++pair) {
    int first = GROUPS, count = 0;
    for (int g = GROUPS - 1; g >= 0; --g)
      if (is_unit(g, pair)) first = g, ++count;
    if (pair % AT_ONCE == 0) before = 0;
    all |= static_cast<unsigned long long>(what == 0 ? first : what == 1 ? count : before) << 8 * pair;
    before += count;
  }
  return all;
}
constexpr unsigned long long FIRST_GROUPS = of_pairs(0), GROUP_COUNTS = of_pairs(1), UNITS_BEFORE = of_pairs(2);
__device__ constexpr int first_group(int pair) { return FIRST_GROUPS >> 8 * pair & 255; }
__device__ constexpr int groups_of(int pair) { return GROUP_COUNTS >> 8 * pair & 255; }
__device__ constexpr int units_before(int pair) { return UNITS_BEFORE >> 8 * pair & 255; }
__device__ constexpr int most_units() {
  int most = 0;
  for (int pair = 0; pair < PAIRS; ++pair) {
    const int units = units_before(pair) + groups_of(pair);
    most = units > most ? units : most;
  }
  return most;
}
constexpr int MOST_UNITS = most_units();  // of a phase
// Units whose pair and group are equally far apart hold the same differences of columns: pair - 2 group, from LEAST on.
constexpr int GROUP_PAIRS = GROUP_COLUMNS / BLOCK_COLUMNS;
__device__ constexpr int least_distance() {
  int least = PAIRS;
  for (int g = 0; g < GROUPS; ++g)
    least = first_pair(g) - GROUP_PAIRS * g < least ? first_pair(g) - GROUP_PAIRS * g : least;
  return least;
}
__device__ constexpr int end_distance() {
  int end = -PAIRS;
  for (int g = 0; g < GROUPS; ++g) end = end_pair(g) - GROUP_PAIRS * g > end ? end_pair(g) - GROUP_PAIRS * g : end;
  return end;
}
constexpr int LEAST = least_distance(), DISTANCES = end_distance() - LEAST;

using Sums = float[DISTANCES][4];    // of dS of half a band
using Queries = float[2][STEPS][4];  // dQ^T of half a band

// ---- shared memory, in bytes ----

// Keys and values: rows of PITCH bytes, of which each 128 hold a pair, their chunks permuted by the row, so that 8 rows
// miss each other's banks. Columns that the map lacks are zeros.
constexpr int PITCH = PAIRS * BLOCK_COLUMNS * TOKEN;
struct KeyPlaces {
  static __device__ __forceinline__ int at(int row, int column, int chunk) {
    return row * PITCH + (((column + SHIFT) * TOKEN + chunk * 16) ^ (row & 7) * 16);
  }
};
// Queries and output gradients: 8 tokens of a group after each other. Tokens that the map lacks are zeros.
using QueryRows = Rows<STEPS * 16>;
struct QueryPlaces {
  static __device__ __forceinline__ int at(int row, int column, int chunk) {
    const int token = row % BAND + column % GROUP_COLUMNS * BAND;
    return ((row / BAND * GROUPS + column / GROUP_COLUMNS) * 8 + token) * TOKEN + QueryRows::chunk(token, chunk);
  }
};
// P and dS of a unit, each 16 keys of 8 queries.
constexpr int WEIGHTS = 256, UNIT = 2 * WEIGHTS;

// The bias table, in units of 1 / scale: a row for each difference of rows, key - query, then 8 of infinities, of which
// a lane takes the one that misses other lanes' banks; within a row, differences of columns from LEAST_DIFFERENCE on.
constexpr int TABLE_ROWS = 2 * KERNEL_0 - 1, COLUMN_DIFFERENCES = 2 * KERNEL_1 - 1;
__device__ __forceinline__ int masked_row(int row) { return TABLE_ROWS + ((row - TABLE_ROWS) & 7); }
constexpr int ENTRIES = TABLE_ROWS * COLUMN_DIFFERENCES;
constexpr int LEAST_DIFFERENCE = BLOCK_COLUMNS * LEAST - SHIFT - GROUP_COLUMNS + 1;
constexpr int DIFFERENCES = BLOCK_COLUMNS * DISTANCES + GROUP_COLUMNS - 1;
constexpr int TABLE_ROW = (DIFFERENCES + 3) / 8 * 8 + 4;  // 8 rows of 4 lie in 32 banks
constexpr int TABLE = (TABLE_ROWS + 8) * TABLE_ROW;

// A map, two of which there are: while one is worked on, the next one comes.
constexpr int QUERIES = BANDS * GROUPS * 8 * TOKEN;
constexpr int K_AT = 0, V_AT = ROWS * PITCH, Q_AT = 2 * V_AT, G_AT = Q_AT + QUERIES, O_AT = G_AT + QUERIES;
constexpr int MAP = O_AT + QUERIES, ZEROS_AT = 2 * MAP, ZEROS = WEIGHTS;  // for keys that a band does not see
constexpr int UNITS_AT = ZEROS_AT + ZEROS, OF_BAND = MOST_UNITS * UNIT;
constexpr int STAGES_AT = UNITS_AT + BANDS * OF_BAND, STAGE = 16 * TOKEN;  // of a warp
// In the end, sums of dS of each half band lie where maps were, a row for each register.
constexpr int SUMS_ROW = 33, SUMS = DISTANCES * 4 * SUMS_ROW * 4;  // in floats; in bytes
static_assert(BANDS * HALVES * SUMS <= STAGES_AT, "they fit there");
constexpr int SCALARS_AT = STAGES_AT + WARPS * STAGE, SCALARS = 128;  // of half a band: struct Scalars
constexpr int TABLE_AT = SCALARS_AT + BANDS * HALVES * SCALARS, STARTS_AT = TABLE_AT + TABLE * 4;
// What lanes look up for each map, because registers are scarce. For each band its first row of keys; for each band, of
// an even number, and row of the map, where the row lies in the band's units or, plus 1, a row of zeros that misses
// other lanes' banks; for each half of a band and lane, the columns that its query lacks; for each band, query of two
// and row of keys, where the bias of pair 0 and group 0's first column lies in the table.
constexpr int PLACES_AT = STARTS_AT + BANDS * 4, PLACES = (BANDS + 1) / 2 * 32, LACKS_AT = PLACES_AT + PLACES * 4;
constexpr int BIAS_AT = LACKS_AT + HALVES * 32 * 4, SHARED_BYTES = BIAS_AT + BANDS * 16 * 4;
