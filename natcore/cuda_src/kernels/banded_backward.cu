// Neighbourhood attention, backward, on tensor cores: small windows, 16-bit elements, no atomics.
//
// A block owns a region of tokens of one (batch entry, head, dilation group), as queries and as keys. It
// copies the keys and values that its queries see, and the queries and output gradients that see its
// keys, into shared memory, once; then QUERY_WARPS warps make dq and drpb, the others dk and dv:
//
//   queries stay    a warp keeps groups of 8 queries (n8) and walks the blocks of 16 keys (m16) around:
//                   S^T = K Q^T, dP^T = V dO^T - delta, P = exp(S - lse), dS = P dP, dQ^T += K^T dS^T
//   keys stay       the mirror image, S and dP computed again from the other side:
//                   S = Q K^T, dP = dO V^T - delta, dV^T += dO^T P, dK^T += Q^T dS
//
// Scores are recomputed because the alternative, float32 sums of dk and dv in shared memory, costs more
// than two more products. An accumulator of scores becomes the B operand of the last product by
// movmatrix. Neighbouring groups of a tile share the blocks they load (see common/bands.cuh).
//
// The bias is the accumulator that S starts from; the same table holds the mask of columns, and lanes
// whose query lacks a row read its row of infinities. Queries outside the map have lse = infinity. As
// a register of dS always holds the same difference key - query while a warp's bands look alike, drpb is
// summed in registers, then in a table for each warp, then over blocks by general_sum_partials, all in a
// fixed order.
//
// Shared memory: K, V, Q, dO spans with rows an odd number of 16-byte chunks apart; {lse, d_lse - delta}
// of each query; a table offset for each column; the bias table; a stage for each warp, by which results
// reach 16-byte stores; a drpb table for each warp of queries.
#include "common/bands.cuh"

struct Params {
  Sizes sizes;
  Layout d_out, q, k, v, out, lse, d_lse, rpb, dq, dk, dv;
};

struct Scales {
  float exponent, result;  // S to the exponent of 2; the call's own
};

// ---- one m16n8 unit of scores: its bias, its probabilities and their gradient ----

struct Unit {
  float s[4], dp[4];  // element i: half i / 2 of the block, token i % 2 of this lane's pair

  // S and dP become P and dS.
  __device__ __forceinline__ void differentiate(float exponent, const float (&lse)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[i] = ex2_approx(fmaf(s[i], exponent, -lse[i]));
      dp[i] *= s[i];
    }
  }
};

// A 16 x 8 accumulator as the B operand of a product over its 16 rows.
__device__ __forceinline__ void as_operand(unsigned (&b)[2], const float (&c)[4]) {
  b[0] = movmatrix_transposed(pack<Element>(c[0], c[1]));
  b[1] = movmatrix_transposed(pack<Element>(c[2], c[3]));
}

// S or dP of all active groups with one block: C += A B over STEPS k16 steps.
template <int STEPS, int COUNT>
__device__ __forceinline__ void multiply_block(float (&c)[COUNT][4], unsigned block, const unsigned (&b)[COUNT][2 * STEPS],
                                               const bool (&active)[COUNT]) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    unsigned a[4];
    ldmatrix_x4(a, block + step * 32);
#pragma unroll
    for (int g = 0; g < COUNT; ++g)
      if (active[g]) Mma<Element>::m16n8k16(c[g], a[0], a[1], a[2], a[3], b[g][2 * step], b[g][2 * step + 1], c[g]);
  }
}

// The transposed product: rows of C are elements of the head, C^T += block^T B.
template <int STEPS, int COUNT>
__device__ __forceinline__ void multiply_transposed(float (&c)[COUNT][STEPS][4], unsigned block,
                                                    const unsigned (&b)[COUNT][2], const bool (&active)[COUNT]) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    unsigned a[4];
    ldmatrix_x4_transposed(a, block + step * 32);
#pragma unroll
    for (int g = 0; g < COUNT; ++g)
      if (active[g]) Mma<Element>::m16n8k16(c[g][step], a[0], a[1], a[2], a[3], b[g][0], b[g][1], c[g][step]);
  }
}

// Where lane l's row of the four matrices of a block starts, given the slots of list rows l % 8 (+ 8).
template <int ROW, int TOKEN>
__device__ __forceinline__ unsigned block_row(const int (&slot)[2], int first, int second, int lane) {
  const int half = lane >> first & 1, chunk = lane >> second & 1;
  return (ROW_HALVES == 2 ? slot[half] : slot[0]) * ROW + (ROW_HALVES == 2 ? 0 : half * TOKEN) + chunk * 16;
}

// The 8 tokens of a group as a B operand, from `row`, the address of token l % 8.
template <int STEPS>
__device__ __forceinline__ void load_group(unsigned (&b)[2 * STEPS], unsigned row, int lane) {
#pragma unroll
  for (int step = 0; step < STEPS; step += 2) {
    if (step + 1 < STEPS) {
      unsigned r[4];
      ldmatrix_x4(r, row + step * 32 + lane / 8 * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) b[2 * step + i] = r[i];
    } else {
      unsigned r[2];
      ldmatrix_x2(r, row + step * 32 + lane / 8 % 2 * 16);
      b[2 * step] = r[0], b[2 * step + 1] = r[1];
    }
  }
}

// Results of a group, D x 8 accumulators, through the warp's stage to memory.
template <int D, int STEPS>
__device__ __forceinline__ void store_group(Element* base, const Layout& s, const float (&c)[STEPS][4], float factor,
                                            unsigned char* stage, int row, int rows, int column, int columns, int lane) {
  const unsigned address = shared_address(stage);
  __syncwarp();
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    unsigned r[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) r[h] = pack<Element>(c[step][2 * h] * factor, c[step][2 * h + 1] * factor);
#if __CUDA_ARCH__ >= 900
    stmatrix_x2_transposed(address + lane % 8 * STAGE_ROW + step * 32 + lane / 8 % 2 * 16, r);
#else
#pragma unroll
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<unsigned*>(stage + lane / 4 * STAGE_ROW + step * 32 + h * 16 + lane % 4 * 4) =
          movmatrix_transposed(r[h]);
#endif
  }
  __syncwarp();
  constexpr int CHUNKS = D / 8;
#pragma unroll
  for (int at = 0; at < 8 * CHUNKS; at += 32) {
    const int i = at + lane, token = i / CHUNKS, chunk = i % CHUNKS;
    const int y = token % BAND, x = token / BAND;
    if ((at + 32 <= 8 * CHUNKS || i < 8 * CHUNKS) && y < rows && x < columns)
      *reinterpret_cast<uint4*>(base + static_cast<long long>(row + y) * s.step[1] +
                                static_cast<long long>(column + x) * s.step[2] + chunk * 8) =
          *reinterpret_cast<const uint4*>(stage + token * STAGE_ROW + chunk * 16);
  }
}

// ---- a tile's place, common to both sides ----

struct Place {
  int plane, row, tile;  // of the region; `tile` counts tiles of columns
  bool exists;
  __device__ __forceinline__ Place(const Region& region, int item) {
    const int band = item / TILES;
    tile = item % TILES;
    plane = region.first[0] + band / (REGION_1 / BAND);
    row = region.first[1] + band % (REGION_1 / BAND) * BAND;
    exists = plane < region.length[0] && row < region.length[1] &&
             region.first[2] + tile * TILE_COLUMNS < region.length[2];
  }
  __device__ __forceinline__ int last_row(const Region& region) const {
    return smaller(row + BAND, region.length[1]) - 1;
  }
};

// The slots of list rows l % 8 and l % 8 + 8 of a row block, in a span of planes of SPAN_1 rows.
template <int SPAN_1>
__device__ __forceinline__ void slots_of(int (&slot)[2], const Rows& rows, int first, const Interval (&span)[2], int lane) {
#pragma unroll
  for (int h = 0; h < ROW_HALVES; ++h) {
    int plane, row;
    rows.at(first + lane % 8 + 8 * h, plane, row);
    slot[h] = (plane - span[0].start) * SPAN_1 + row - span[1].start;
  }
}

// ---- drpb ----

// Sums of dS, one for each element of each unit of a group, for as long as bands look alike.
struct BiasSums {
  float sum[QUERY_BLOCKS][4];
  int plane, row, rows, count;  // the list's first row relative to the band's, its rows, all its rows; -1: nothing yet
  int first;                    // row block

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int u = 0; u < QUERY_BLOCKS; ++u)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[u][i] = 0.f;
  }
  __device__ __forceinline__ bool fits(const Rows& list, const Place& place, int block) const {
    return plane == list.plane - place.plane && row == list.row - place.row && rows == list.rows &&
           count == list.count() && first == block;
  }
  __device__ __forceinline__ void start(const Rows& list, const Place& place, int block) {
    plane = list.plane - place.plane, row = list.row - place.row;
    rows = list.rows, count = list.count(), first = block;
    clear();
  }
  // Adds the sums to the warp's table. Lanes with the same difference take turns.
  __device__ __forceinline__ void flush(float* table, int lane) const {
    if (count < 0) return;
#pragma unroll
    for (int turn = 0; turn < BAND / 2; ++turn) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = lane % 4 * 2 + i % 2, at = first + lane / 4 + (ROW_HALVES == 2 ? 8 * (i / 2) : 0);
        const int d0 = plane + at / rows + KERNEL_0 - 1, d1 = row + at % rows - token % BAND + KERNEL_1 - 1;
        const bool valid = at < count && 0 <= d0 && d0 < 2 * KERNEL_0 - 1 && 0 <= d1 && d1 < ROW_DIFFERENCES &&
                           token % BAND / 2 == turn;
        float* entries = table + (d0 * ROW_DIFFERENCES + d1) * COLUMN_DIFFERENCES;
#pragma unroll
        for (int u = 0; u < QUERY_BLOCKS; ++u) {
          const int column = u * BLOCK_COLUMNS + (ROW_HALVES == 2 ? 0 : i / 2) - QUERY_LEFT - token / BAND;
          if (valid && -KERNEL_2 < column && column < KERNEL_2) entries[column + KERNEL_2 - 1] += sum[u][i];
          __syncwarp();  // another lane's next entry may be this one
        }
      }
    }
  }
};

// ---- the two sides ----

// dq of a tile of queries, and its share of drpb.
__device__ __forceinline__ void query_tile(const Region& region, const Place& place, const Scales& scales,
                                           unsigned char* shared, BiasSums& sums, float* sums_table, Element* dq,
                                           const Layout& dq_layout, int lane) {
  const unsigned base = shared_address(shared);
  const float* table = reinterpret_cast<const float*>(shared + TABLE_AT);
  const float2* scalars = reinterpret_cast<const float2*>(shared + SCALARS_AT);
  const Interval planes = keys_of_range(0, place.plane, place.plane, region.length[0]);
  const Interval span = keys_of_range(1, place.row, place.last_row(region), region.length[1]);
  const Rows list{planes.start, planes.end - planes.start, span.start, span.end - span.start};

  unsigned query[GROUPS][2 * D_STEPS], gradient[GROUPS][2 * V_STEPS];
  float lse[GROUPS][4], minus_delta[GROUPS][4], acc[GROUPS][D_STEPS][4] = {};
  int variant[GROUPS];
  const int plane_slot = (place.plane - region.queries[0].start) * QUERY_SPAN_1 - region.queries[1].start;
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    const int first = place.tile * TILE_COLUMNS + g * GROUP_COLUMNS;  // column within the region
    const int slot = plane_slot + smaller(place.row + lane % 8 % BAND, place.last_row(region));
    const int at = first + lane % 8 / BAND + KEY_LEFT;
    load_group<D_STEPS>(query[g], base + Q_AT + slot * Q_ROW + at * D_TOKEN, lane);
    load_group<V_STEPS>(gradient[g], base + G_AT + slot * G_ROW + at * V_TOKEN, lane);
    const int token = lane % 4 * 2, column = first + token / BAND;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = smaller(place.row + (token + e) % BAND, place.last_row(region));
      const float2 pair = scalars[(plane_slot + row) * QUERY_COLUMNS + column + KEY_LEFT];
      lse[g][e] = lse[g][e + 2] = pair.x;
      minus_delta[g][e] = minus_delta[g][e + 2] = pair.y;
    }
    variant[g] = variant_of(region.first[2] + column, region.length[2]) - QUERY_LEFT - token / BAND - LEAST_DIFFERENCE;
  }

#pragma unroll 1
  for (int first = 0; first < list.count(); first += BLOCK_ROWS) {
    int slot[2];
    slots_of<KEY_SPAN_1>(slot, list, first, region.keys, lane);
    const int columns = place.tile * TILE_COLUMNS;
    const unsigned keys = base + K_AT + columns * D_TOKEN, values = base + V_AT + columns * V_TOKEN;
    const unsigned key_block = keys + block_row<K_ROW, D_TOKEN>(slot, 3, 4, lane);
    const unsigned key_block_t = keys + block_row<K_ROW, D_TOKEN>(slot, 4, 3, lane);
    const unsigned value_block = values + block_row<V_ROW, V_TOKEN>(slot, 3, 4, lane);
    const float* bias[2][2];  // of token e and half h
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (h >= ROW_HALVES) {
          bias[e][h] = bias[e][0] + 1;
          continue;
        }
        int plane, row, table_at = MASKED_ROW;
        const int i = first + lane / 4 + 8 * h;
        list.at(i, plane, row);
        if (i < list.count())
          table_at = table_row(region, place.plane, place.row + (lane % 4 * 2 + e) % BAND, plane, row);
        bias[e][h] = table + table_at * TABLE_ROW;
      }
    }
    if (!sums.fits(list, place, first)) {
      sums.flush(sums_table, lane);
      sums.start(list, place, first);
    }

    constexpr int BLOCKS = (GROUPS - 1) * STEP + QUERY_BLOCKS;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      bool active[GROUPS];
      float s[GROUPS][4], dp[GROUPS][4];
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        active[g] = b >= g * STEP && b < g * STEP + QUERY_BLOCKS;
        if (!active[g]) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[g][i] = bias[i % 2][i / 2][variant[g] + (b - g * STEP) * BLOCK_COLUMNS];
          dp[g][i] = minus_delta[g][i];
        }
      }
      multiply_block<D_STEPS>(s, key_block + b * BLOCK_COLUMNS * D_TOKEN, query, active);
      multiply_block<V_STEPS>(dp, value_block + b * BLOCK_COLUMNS * V_TOKEN, gradient, active);
      unsigned ds[GROUPS][2];
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        if (!active[g]) continue;
        const int u = b - g * STEP;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dp[g][i] *= ex2_approx(fmaf(s[g][i], scales.exponent, -lse[g][i]));
          sums.sum[u][i] += dp[g][i];
        }
        as_operand(ds[g], dp[g]);
      }
      multiply_transposed<D_STEPS>(acc, key_block_t + b * BLOCK_COLUMNS * D_TOKEN, ds, active);
    }
  }

  if (dq != nullptr) {
    unsigned char* stage = shared + STAGE_AT + threadIdx.x / 32 * STAGE;
    Element* target = dq + static_cast<long long>(place.plane) * dq_layout.step[0];
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const int column = region.first[2] + place.tile * TILE_COLUMNS + g * GROUP_COLUMNS;
      store_group<HEAD_DIM>(target, dq_layout, acc[g], scales.result, stage, place.row, region.length[1] - place.row,
                            column, region.length[2] - column, lane);
    }
  }
}

// dk and dv of a tile of keys.
__device__ __forceinline__ void key_tile(const Region& region, const Place& place, const Scales& scales,
                                         unsigned char* shared, Element* dk, Element* dv, const Layout& dk_layout,
                                         const Layout& dv_layout, int lane) {
  const unsigned base = shared_address(shared);
  const float* table = reinterpret_cast<const float*>(shared + TABLE_AT);
  const int* columns_at = reinterpret_cast<const int*>(shared + COLUMNS_AT) + place.tile * TILE_COLUMNS;
  const Interval planes = queries_of_range(0, place.plane, place.plane, region.length[0]);
  const Interval span = queries_of_range(1, place.row, place.last_row(region), region.length[1]);
  const Rows list{planes.start, planes.end - planes.start, span.start, span.end - span.start};

  unsigned key[GROUPS][2 * D_STEPS], value[GROUPS][2 * V_STEPS];
  float dk_acc[GROUPS][D_STEPS][4] = {}, dv_acc[GROUPS][V_STEPS][4] = {};
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    const int at = place.tile * TILE_COLUMNS + g * GROUP_COLUMNS + lane % 8 / BAND + QUERY_LEFT;
    const int slot = (place.plane - region.keys[0].start) * KEY_SPAN_1 - region.keys[1].start +
                     smaller(place.row + lane % 8 % BAND, place.last_row(region));
    load_group<D_STEPS>(key[g], base + K_AT + slot * K_ROW + at * D_TOKEN, lane);
    load_group<V_STEPS>(value[g], base + V_AT + slot * V_ROW + at * V_TOKEN, lane);
  }

#pragma unroll 1
  for (int first = 0; first < list.count(); first += BLOCK_ROWS) {
    int slot[2];
    slots_of<QUERY_SPAN_1>(slot, list, first, region.queries, lane);
    const int columns = place.tile * TILE_COLUMNS;
    const unsigned queries = base + Q_AT + columns * D_TOKEN, gradients = base + G_AT + columns * V_TOKEN;
    const unsigned query_block = queries + block_row<Q_ROW, D_TOKEN>(slot, 3, 4, lane);
    const unsigned query_block_t = queries + block_row<Q_ROW, D_TOKEN>(slot, 4, 3, lane);
    const unsigned gradient_block = gradients + block_row<G_ROW, V_TOKEN>(slot, 3, 4, lane);
    const unsigned gradient_block_t = gradients + block_row<G_ROW, V_TOKEN>(slot, 4, 3, lane);
    const float* bias[2][2];
    const float2* scalars[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (h >= ROW_HALVES) {
        scalars[h] = scalars[0] + 1;
        bias[0][h] = bias[0][0], bias[1][h] = bias[1][0];
        continue;
      }
      int plane, row;
      const int i = first + lane / 4 + 8 * h;
      list.at(i, plane, row);
      const int at = (plane - region.queries[0].start) * QUERY_SPAN_1 + row - region.queries[1].start;
      scalars[h] = reinterpret_cast<const float2*>(shared + SCALARS_AT) + at * QUERY_COLUMNS + columns;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int table_at = MASKED_ROW;
        const int token = lane % 4 * 2 + e;
        if (i < list.count()) table_at = table_row(region, plane, row, place.plane, place.row + token % BAND);
        bias[e][h] = table + table_at * TABLE_ROW + token / BAND;
      }
    }

    constexpr int BLOCKS = (GROUPS - 1) * STEP + KEY_BLOCKS;
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      bool active[GROUPS];
      float s[GROUPS][4], dp[GROUPS][4], lse[4], minus_delta[4];
      int column[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 pair = scalars[h][b * BLOCK_COLUMNS];
        lse[2 * h] = lse[2 * h + 1] = pair.x;
        minus_delta[2 * h] = minus_delta[2 * h + 1] = pair.y;
        column[h] = columns_at[b * BLOCK_COLUMNS + (ROW_HALVES == 2 ? 0 : h)];
      }
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        active[g] = b >= g * STEP && b < g * STEP + KEY_BLOCKS;
        if (!active[g]) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[g][i] = bias[i % 2][i / 2][column[i / 2] + columns + g * GROUP_COLUMNS];
          dp[g][i] = minus_delta[i];
        }
      }
      multiply_block<D_STEPS>(s, query_block + b * BLOCK_COLUMNS * D_TOKEN, key, active);
      multiply_block<V_STEPS>(dp, gradient_block + b * BLOCK_COLUMNS * V_TOKEN, value, active);
      unsigned p[GROUPS][2], ds[GROUPS][2];
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        if (!active[g]) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[g][i] = ex2_approx(fmaf(s[g][i], scales.exponent, -lse[i]));
          dp[g][i] *= s[g][i];
        }
        as_operand(p[g], s[g]);
        as_operand(ds[g], dp[g]);
      }
      multiply_transposed<V_STEPS>(dv_acc, gradient_block_t + b * BLOCK_COLUMNS * V_TOKEN, p, active);
      multiply_transposed<D_STEPS>(dk_acc, query_block_t + b * BLOCK_COLUMNS * D_TOKEN, ds, active);
    }
  }

  unsigned char* stage = shared + STAGE_AT + threadIdx.x / 32 * STAGE;
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    const int column = region.first[2] + place.tile * TILE_COLUMNS + g * GROUP_COLUMNS;
    const int rows = region.length[1] - place.row, count = region.length[2] - column;
    if (dk != nullptr)
      store_group<HEAD_DIM>(dk + static_cast<long long>(place.plane) * dk_layout.step[0], dk_layout, dk_acc[g],
                            scales.result, stage, place.row, rows, column, count, lane);
    if (dv != nullptr)
      store_group<HEAD_DIM_V>(dv + static_cast<long long>(place.plane) * dv_layout.step[0], dv_layout, dv_acc[g], 1.f,
                              stage, place.row, rows, column, count, lane);
  }
}

// ---- per region: what both sides need of each query ----

// {lse in units of log 2, d_lse - delta} of the queries whose output gradients this warp has copied.
__device__ __forceinline__ void fill_scalars(const Region& region, unsigned char* shared, const Element* out,
                                             const Layout& out_layout, const float* lse, const Layout& lse_layout,
                                             const float* d_lse, const Layout& d_lse_layout, int lane) {
  constexpr int CHUNKS = HEAD_DIM_V / 8;
  const int rows = region.queries[1].end - region.queries[1].start;
  const int count = (region.queries[0].end - region.queries[0].start) * rows;
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < count; i += THREADS / 32) {
    const int plane = KERNEL_0 == 1 && REGION_0 == 1 ? 0 : i / rows, row = i - plane * rows;
    const int at = plane * QUERY_SPAN_1 + row, x0 = region.queries[0].start + plane, x1 = region.queries[1].start + row;
#pragma unroll 1
    for (int column = lane; column < QUERY_COLUMNS; column += 32) {
      const int x2 = region.first[2] - KEY_LEFT + column;
      float2 pair{positive_infinity(), 0.f};
      if (0 <= x2 && x2 < region.length[2]) {
        const uint4* values = reinterpret_cast<const uint4*>(shifted(out, out_layout, x0, x1, x2));
        const unsigned char* gradients = shared + G_AT + at * G_ROW + column * V_TOKEN;
        pair.x = LOG2_E * *shifted(lse, lse_layout, x0, x1, x2);
        if (d_lse != nullptr) pair.y = *shifted(d_lse, d_lse_layout, x0, x1, x2);
#pragma unroll 4
        for (int c = 0; c < CHUNKS; ++c) {
          int chunk = c + (V_TOKEN == 64 ? lane / 2 % 4 : 0);  // so that lanes meet different banks
          if (V_TOKEN == 64) chunk %= CHUNKS;
          const uint4 a = values[chunk], b = *reinterpret_cast<const uint4*>(gradients + chunk * 16);
          const unsigned x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            pair.y = fmaf(-low<Element>(x[j]), low<Element>(y[j]), pair.y);
            pair.y = fmaf(-high<Element>(x[j]), high<Element>(y[j]), pair.y);
          }
        }
      }
      reinterpret_cast<float2*>(shared + SCALARS_AT)[at * QUERY_COLUMNS + column] = pair;
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    banded_backward(const Element* __restrict__ d_out,    // [batch, x0, x1, x2, heads, HEAD_DIM_V]
                    const Element* __restrict__ q,        // [batch, x0, x1, x2, heads, HEAD_DIM]
                    const Element* __restrict__ k,        // [batch, x0, x1, x2, heads, HEAD_DIM]
                    const Element* __restrict__ v,        // [batch, x0, x1, x2, heads, HEAD_DIM_V]
                    const Element* __restrict__ out,      // [batch, x0, x1, x2, heads, HEAD_DIM_V]
                    const float* __restrict__ lse,        // [batch, x0, x1, x2, heads]
                    const float* __restrict__ d_lse,      // [batch, x0, x1, x2, heads], or null: zeros
                    const BiasElement* __restrict__ rpb,  // [heads, 2 k0 - 1, 2 k1 - 1, 2 k2 - 1]
                    Element* __restrict__ dq, Element* __restrict__ dk, Element* __restrict__ dv,  // or null
                    float* __restrict__ drpb_partials,  // [slices, heads, 2 k0 - 1, 2 k1 - 1, 2 k2 - 1], or null
                    const float scale, const __grid_constant__ Params params) {
  extern __shared__ __align__(16) unsigned char shared[];
  const Sizes& sizes = params.sizes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = blockIdx.x % sizes.heads, slice = blockIdx.x / sizes.heads;
  const float unit = unit_of(scale);
  const Scales scales{unit * LOG2_E, scale};
  const unsigned base = shared_address(shared);

  fill_table(reinterpret_cast<float*>(shared + TABLE_AT), rpb + static_cast<long long>(head) * params.rpb.head,
             params.rpb, unit);
  for (int i = threadIdx.x; i < QUERY_WARPS * ENTRIES; i += THREADS)
    reinterpret_cast<float*>(shared + SUMS_AT)[i] = 0.f;
  clear_padding<HEAD_DIM, D_TOKEN, K_ROW, KEY_COLUMNS>(shared + K_AT, KEY_ROWS);
  clear_padding<HEAD_DIM_V, V_TOKEN, V_ROW, KEY_COLUMNS>(shared + V_AT, KEY_ROWS);
  clear_padding<HEAD_DIM, D_TOKEN, Q_ROW, QUERY_COLUMNS>(shared + Q_AT, QUERY_ROWS);
  clear_padding<HEAD_DIM_V, V_TOKEN, G_ROW, QUERY_COLUMNS>(shared + G_AT, QUERY_ROWS);

  BiasSums sums;
  sums.count = -1;
  sums.clear();
  float* sums_table = reinterpret_cast<float*>(shared + SUMS_AT) + warp * ENTRIES;
  const long long items = static_cast<long long>(sizes.batch) * DILATION_0 * DILATION_1 * DILATION_2 *
                          sizes.regions[0] * sizes.regions[1] * sizes.regions[2];
  const int end = static_cast<int>(items * (slice + 1) / sizes.slices);
#pragma unroll 1
  for (int item = static_cast<int>(items * slice / sizes.slices); item < end; ++item) {
    const Region region(sizes, item);
    if (!region.exists) continue;
    __syncthreads();  // the last region has been read
    load_span<HEAD_DIM_V, V_TOKEN, G_ROW, QUERY_COLUMNS, QUERY_SPAN_1>(
        base + G_AT, region.base(d_out, params.d_out, head), params.d_out, region, region.queries, KEY_LEFT);
    cp_async_commit();
    load_span<HEAD_DIM, D_TOKEN, Q_ROW, QUERY_COLUMNS, QUERY_SPAN_1>(
        base + Q_AT, region.base(q, params.q, head), params.q, region, region.queries, KEY_LEFT);
    load_span<HEAD_DIM, D_TOKEN, K_ROW, KEY_COLUMNS, KEY_SPAN_1>(base + K_AT, region.base(k, params.k, head), params.k,
                                                                 region, region.keys, QUERY_LEFT);
    load_span<HEAD_DIM_V, V_TOKEN, V_ROW, KEY_COLUMNS, KEY_SPAN_1>(
        base + V_AT, region.base(v, params.v, head), params.v, region, region.keys, QUERY_LEFT);
    cp_async_commit();
    for (int column = threadIdx.x; column < QUERY_COLUMNS; column += THREADS)
      reinterpret_cast<int*>(shared + COLUMNS_AT)[column] =
          variant_of(region.first[2] - KEY_LEFT + column, region.length[2]) + KEY_LEFT - column - LEAST_DIFFERENCE;
    cp_async_wait<1>();
    __syncwarp();  // a warp's rows of d_out are its own copies
    fill_scalars(region, shared, region.base(out, params.out, head), params.out, region.base(lse, params.lse, head),
                 params.lse, d_lse == nullptr ? nullptr : region.base(d_lse, params.d_lse, head), params.d_lse, lane);
    cp_async_wait<0>();
    __syncthreads();
    if (warp < QUERY_WARPS) {
      for (int i = warp; i < BANDS * TILES; i += QUERY_WARPS) {
        const Place place(region, i);
        if (place.exists)
          query_tile(region, place, scales, shared, sums, sums_table,
                     dq == nullptr ? nullptr : region.base(dq, params.dq, head), params.dq, lane);
      }
    } else {
      for (int i = warp - QUERY_WARPS; i < BANDS * TILES; i += THREADS / 32 - QUERY_WARPS) {
        const Place place(region, i);
        if (place.exists)
          key_tile(region, place, scales, shared, dk == nullptr ? nullptr : region.base(dk, params.dk, head),
                   dv == nullptr ? nullptr : region.base(dv, params.dv, head), params.dk, params.dv, lane);
      }
    }
  }

  if (drpb_partials == nullptr) return;
  __syncthreads();
  if (warp < QUERY_WARPS) sums.flush(sums_table, lane);
  __syncthreads();
  for (int i = threadIdx.x; i < ENTRIES; i += THREADS) {
    float sum = 0.f;
    for (int w = 0; w < QUERY_WARPS; ++w) sum += reinterpret_cast<const float*>(shared + SUMS_AT)[w * ENTRIES + i];
    drpb_partials[(static_cast<long long>(slice) * sizes.heads + head) * ENTRIES + i] = sum;
  }
}
