// The resident forward: where things lie in shared memory, and what is made once for all maps of a block.
//
// Defines: those of resident_map.cuh, SEEN (columns of keys that half a band sees), STAGES (maps in shared memory).
#pragma once

#include "common/resident_map.cuh"
#include "common/turn.cuh"
#include "ptx/mbarrier.cuh"

constexpr int WIDTH = (COLUMNS + HALVES - 1) / HALVES;  // of half a band: columns of queries
constexpr int D_STEPS = (HEAD_DIM + 15) / 16, V_CHUNKS = HEAD_DIM_V / 8;
constexpr int COPIERS = 32 * (WARPS - FIRST_COPIER);  // threads
constexpr bool SEPARATE = FIRST_COPIER > 0;           // copiers do nothing else
static_assert(SEPARATE ? FIRST_COPIER == WORKERS : WARPS == WORKERS, "no warp idles");

// ---- shared memory, in bytes ----

// Keys and values: rows of PITCH bytes, of which each 128 hold two columns, their chunks permuted by the row, so that 8
// rows miss each other's banks. Columns that the map lacks are zeros.
constexpr int PITCH = (COLUMNS + 1) / 2 * 2 * TOKEN;
struct KeyPlaces {
  static __device__ __forceinline__ int at(int row, int column, int chunk) {
    return row * PITCH + ((column * TOKEN + chunk * 16) ^ (row & 7) * 16);
  }
};
// Queries: 8 neighbours of a row miss each other's banks.
struct QueryPlaces {
  static __device__ __forceinline__ int at(int row, int column, int chunk) {
    return (row * COLUMNS + column) * TOKEN + Rows<32>::chunk(column, chunk);
  }
};
constexpr int K_AT = 0, V_AT = ROWS * PITCH, Q_AT = 2 * V_AT, MAP = (Q_AT + ROWS * COLUMNS * TOKEN + 127) / 128 * 128;
constexpr int TABLE_ROWS = 2 * KERNEL_0 - 1, TABLE_COLUMNS = 2 * KERNEL_1 - 1, TABLE = TABLE_ROWS * TABLE_COLUMNS;
constexpr int STAGES_AT = STAGES * MAP, STAGE = 16 * TOKEN;  // of a warp, by which results reach 16-byte stores
constexpr int LOOKUPS_AT = STAGES_AT + WORKERS * STAGE, LOOKUP = 36;  // of a lane: structs Operands and Results
constexpr int BARRIERS_AT = LOOKUPS_AT + WORKERS * 32 * LOOKUP, TABLE_AT = BARRIERS_AT + (3 * STAGES + 2) * 8;
constexpr int SHARED_BYTES = TABLE_AT + TABLE * 4;

struct Barriers {
  unsigned base;
  __device__ __forceinline__ unsigned keys(int slot) const { return base + slot * 8; }  // and queries
  __device__ __forceinline__ unsigned values(int slot) const { return base + (STAGES + slot) * 8; }
  __device__ __forceinline__ unsigned free(int slot) const { return base + (2 * STAGES + slot) * 8; }
  // The first map's, where all help to copy it.
  __device__ __forceinline__ unsigned first_keys() const { return base + 3 * STAGES * 8; }
  __device__ __forceinline__ unsigned first_values() const { return base + (3 * STAGES + 1) * 8; }
  // By one thread: of several the compiler would make a loop over lanes, as the instruction takes a uniform address.
  __device__ __forceinline__ void make() const {
#pragma unroll
    for (int slot = 0; slot < STAGES; ++slot) {
      mbarrier_init(keys(slot), COPIERS);
      mbarrier_init(values(slot), COPIERS);
      mbarrier_init(free(slot), WORKERS);
    }
    mbarrier_init(first_keys(), THREADS);
    mbarrier_init(first_values(), THREADS);
  }
};

// Clears what no copy writes but products read: columns, and chunks of the last 16 elements, that the map lacks.
__device__ __forceinline__ void clear_missing(unsigned char* shared, const Share& share) {
  const uint4 zeros = make_uint4(0, 0, 0, 0);
  const int missing = PITCH / TOKEN - share.length[1];
  for (int i = threadIdx.x; i < STAGES * 2 * ROWS * missing * CHUNKS; i += 32 * WORKERS) {
    const int chunk = i % CHUNKS, rest = i / CHUNKS, column = rest % missing + share.length[1], row = rest / missing;
    unsigned char* tensor = shared + row / ROWS / 2 * MAP + row / ROWS % 2 * V_AT;
    *reinterpret_cast<uint4*>(tensor + KeyPlaces::at(row % ROWS, column, chunk)) = zeros;
  }
  if (HEAD_DIM % 16 == 0) return;
  for (int i = threadIdx.x; i < STAGES * ROWS * COLUMNS; i += 32 * WORKERS) {
    unsigned char* map = shared + i / (ROWS * COLUMNS) * MAP;
    const int row = i / COLUMNS % ROWS, column = i % COLUMNS;
    *reinterpret_cast<uint4*>(map + K_AT + KeyPlaces::at(row, column, HEAD_DIM / 8)) = zeros;
    *reinterpret_cast<uint4*>(map + Q_AT + QueryPlaces::at(row, column, HEAD_DIM / 8)) = zeros;
  }
}

// A worker thread's share of the head's bias. It is fetched before anything else: behind the first copies it would come
// after them.
struct BiasShare {
  static constexpr int COUNT = (TABLE + 32 * WORKERS - 1) / (32 * WORKERS);
  BiasElement its[COUNT];

  __device__ __forceinline__ BiasShare(const BiasElement* rpb, const Layout& s) {
#ifdef RPB
    rpb += static_cast<long long>(blockIdx.x) * s.head;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      const int i = threadIdx.x + n * 32 * WORKERS;
      its[n] = BiasElement();
      if (threadIdx.x < 32 * WORKERS && i < TABLE) its[n] = rpb[s.of(i / TABLE_COLUMNS, i % TABLE_COLUMNS)];
    }
#endif
  }
  // To the table, times `factor`.
  __device__ __forceinline__ void write(float* table, float factor) const {
#ifdef RPB
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
      const int i = threadIdx.x + n * 32 * WORKERS;
      if (i < TABLE) table[i] = widen(its[n]) * factor;
    }
#endif
  }
};

// Half a band: its queries, from (row, column) on, 8 a row, of which those the map or the half lacks repeat its last;
// and the keys that they see, 8 rows of SEEN columns from (first_row, first_column) on. Its number is the warp's.
struct Half {
  int row, column, end, first_row, first_column;

  __device__ __forceinline__ Half(const Share& share, int warp) {
    row = warp / HALVES * BAND, column = warp % HALVES * WIDTH;
    end = smaller(column + WIDTH, share.length[1]);
    first_row = share.start_of(row / BAND);
    first_column = smaller(keys_of(window_of(1), column, share.length[1]).start, PITCH / TOKEN - SEEN);
  }
};

using Scores = float[SEEN][4];  // element i of a column: query lane / 4 of row i / 2, key 2 (lane % 4) + i % 2

// What scores start from: the bias, in units of 1 / scale, or -infinity where a query does not see the key.
__device__ __forceinline__ void find_start(Scores& start, const float* table, const Half& half, const Share& share,
                                           int lane) {
  const int x = smaller(half.column + lane / 4, half.end - 1);
  const Interval columns = keys_of(window_of(1), x, share.length[1]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int y = smaller(half.row + i / 2, share.length[0] - 1), key = half.first_row + lane % 4 * 2 + i % 2;
    const Interval rows = keys_of(window_of(0), y, share.length[0]);
    const bool sees_row = rows.start <= key && key < rows.end;
    const float* its = table + (key - y + KERNEL_0 - 1) * TABLE_COLUMNS + half.first_column - x + KERNEL_1 - 1;
#pragma unroll
    for (int j = 0; j < SEEN; ++j) {
      const int column = half.first_column + j;
      const bool sees = sees_row && columns.start <= column && column < columns.end;
      float its_start = __int_as_float(0xff800000);
#ifdef RPB
      if (sees) its_start = its[j];
#else
      if (sees) its_start = 0.f;
#endif
      start[j][i] = __int_as_float(anew(__float_as_int(its_start)));  // the compiler is not to make it again instead
    }
  }
}

// Where a lane finds its operands in a map, and where its results go: looked up for each map, as registers are scarce.
struct Operands {
  unsigned key, value, query;  // of columns 0 and 1: this lane's chunk of column 0; of both; of its query
  unsigned odd;                // from a chunk of column 0, flipped at the 64s, to that of column 1
};
struct Results {
  int out, lse;                // of the lane's chunk of the first row's token; of its token's lse
  int first, second, its_lse;  // whether there are that token, the second row's, and the lane's lse
};
static_assert(sizeof(Operands) + sizeof(Results) == LOOKUP, "");

__device__ __forceinline__ Operands find_operands(const Half& half, const Share& share, int lane) {
  const int key_row = smaller(half.first_row + lane % 8, share.length[0] - 1), column = half.first_column;
  const int query_row = smaller(half.row + lane / 8 % 2, share.length[0] - 1);
  return {static_cast<unsigned>(KeyPlaces::at(key_row, column, lane / 8)),
          static_cast<unsigned>(KeyPlaces::at(key_row, column + lane / 8 % 2, lane / 16)),
          static_cast<unsigned>(QueryPlaces::at(query_row, smaller(half.column + lane % 8, half.end - 1), lane / 16)),
          column % 2 * 128u};
}

__device__ __forceinline__ Results find_results(const Half& half, const Share& share, const Layout& out,
                                                const Layout& lse, int lane) {
  const int x = half.column + lane / 4, y = half.row + lane % 4 % 2;
  const bool has = x < half.end && half.row < share.length[0], stores = has && lane % 4 < V_CHUNKS;
  return {out.of(half.row, x) + lane % 4 * 8, lse.of(y, x), stores,
          stores && half.row + 1 < share.length[0], has && lane % 4 < 2 && y < share.length[0]};
}
