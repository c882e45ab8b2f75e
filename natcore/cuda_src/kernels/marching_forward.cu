// Neighbourhood attention, forward, on tensor cores: small two-dimensional windows, 16-bit elements.
//
// A block marches down strips of the map (common/strips.cuh): a band of rows is one step. Producer warps copy rows of
// keys, values and queries into rings in shared memory (common/strip_loads.cuh); each other warp keeps one tile of
// columns and one head all the way, so that all addresses but a band's rows are constants. Warps wait for nothing but
// their rows, so one warp's products run under another one's exponentials.
//
//     ring of rows of K and V        band i               S^T = K Q^T: 16 keys x 8 queries a product, so that all
//     . . . . . . . . . . . . .      waits for the last   windows of a band and a group of columns take the fewest
//     k k k k k k k k k k k k k      of its rows,         blocks; S starts from bias and mask (common/strip_bias.cuh)
//     k k k q q q q|q q q q k k      gives back the       P = exp2(unit (S - max)), all in registers
//     k k k q q q q|q q q q k k      first ones           O^T = V^T P^T
//     k k k k k k k k k k k k k
//     . . . . . . . . . . . . .      One warp's tile: two groups of 4 x 2 queries, and its keys.
//
// Shared memory (NAT-Tiny, 56x56, two heads: strips of 56 columns, RING 5): rings of K and V, RING * BAND rows of
// COLUMNS tokens of HEADS heads, 143 KB; QUERY_RING bands of Q, 32 KB; a stage for each warp, by which results reach
// 16-byte stores, 18 KB; two bias tables a head, 6 KB; barriers.
#include "common/strip_bias.cuh"
#include "common/strip_loads.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/math.cuh"

// A warp's tile within a run: its first column, the first that it stores, and how its windows lie.
struct Tile {
  int x, owned;
  bool exists, clamped;
  __device__ __forceinline__ Tile(const Run& run, int number) {
    x = run.start + smaller(number * TILE, larger(smaller(STRIP, run.length[1]) - TILE, 0));
    owned = PADDED ? run.owned : number * TILE;
    exists = owned < run.length[1] && x + TILE > owned;
    const int left = CAUSAL_1 ? KERNEL_1 - 1 : KERNEL_1 / 2;
    clamped = STRIDE_1 > 1 || x < left || x + TILE - 1 - left + KERNEL_1 > run.length[1];
  }
  __device__ __forceinline__ int group(int g) const { return x + g * GROUP_COLUMNS; }
  // The first column of group g's first block. The blocks of a tile of one group stay inside the map.
  __device__ __forceinline__ int block(int g, int length) const {
    return GROUPS == 1 ? larger(smaller(x - LEFT, length - BLOCKS * BLOCK_COLUMNS), 0) : group(g) - LEFT;
  }
};

// The 8 queries of a group as B operands, times `factor`; `row` and `byte` are where query lane % 8 lies.
__device__ __forceinline__ void load_queries(unsigned (&b)[2 * D_STEPS], unsigned row, int byte, float factor,
                                             int lane) {
#pragma unroll
  for (int step = 0; step < D_STEPS; step += 2) {
    unsigned r[4];
    const int chunk = smaller(step * 32 + lane / 8 * 16, D_STEPS * 32 - 16);
    ldmatrix_x4(r, row + QueryRows::at(byte + chunk, lane % 8 % BAND));
#pragma unroll
    for (int i = 0; i < 4 && 2 * step + i < 2 * D_STEPS; ++i) b[2 * step + i] = r[i];
  }
  if (factor != 1.f) {
#pragma unroll
    for (unsigned& pair : b) pair = pack<Element>(factor * low<Element>(pair), factor * high<Element>(pair));
  }
}

using Scores = float[GROUPS][BLOCKS][4];  // element i: key i / 2 * 8 + lane / 4 of a block, query 2 (lane % 4) + i % 2

// S = bias + mask + K Q^T of a tile. `keys` is where this lane's key of the first block lies, for each step; `bias`, of
// query e of its pair and key half h, the bias of the first block's first column.
template <bool CLAMPED>
__device__ __forceinline__ void score(Scores& s, const unsigned (&query)[GROUPS][2 * D_STEPS],
                                      const unsigned (&keys)[D_STEPS],
                                      const float* const (&bias)[2][2], const unsigned (&lacks)[GROUPS][2], int lane) {
#pragma unroll
  for (int b = 0; b < TILE_BLOCKS; ++b) {
    unsigned key[D_STEPS][4];
#pragma unroll
    for (int step = 0; step < D_STEPS; ++step)
      ldmatrix_x4(key[step], keys[step] + b * (BLOCK_COLUMNS * K::TOKEN));
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const int own = b - g * STEP;
      if (own < 0 || own >= BLOCKS) continue;
      float(&c)[4] = s[g][own];
      const int column = own * BLOCK_COLUMNS;
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] = bias[i % 2][i / 2][column];
      if (CLAMPED) mask_columns(c, own, lacks[g], lane);
#pragma unroll
      for (int step = 0; step < D_STEPS; ++step)
        Mma<Element>::m16n8k16(c, key[step][0], key[step][1], key[step][2], key[step][3], query[g][2 * step],
                               query[g][2 * step + 1], c);
    }
  }
}

// Scores become exp2(unit (s - top)).
__device__ __forceinline__ void soften(Scores& s, float (&top)[GROUPS][2], float unit) {
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float most = fmaxf(s[g][0][e], s[g][0][e + 2]);
#pragma unroll
      for (int b = 1; b < BLOCKS; ++b) most = fmaxf(most, fmaxf(s[g][b][e], s[g][b][e + 2]));
#pragma unroll
      for (int other = 4; other < 32; other *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, other));
      top[g][e] = most;
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float shift = top[g][e] * unit;
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
#pragma unroll
        for (int i = e; i < 4; i += 2) s[g][b][i] = ex2_approx(__fmaf_rn(s[g][b][i], unit, -shift));
      }
    }
  }
}

// O^T = V^T P^T. `values` is where this lane's key of the first block lies, for each step. A product with ones sums the
// weights as they are rounded for O; all rows of `sum` are the same.
__device__ __forceinline__ void weigh(float (&o)[GROUPS][V_STEPS][4], float (&sum)[GROUPS][4], const Scores& p,
                                      const unsigned (&values)[V_STEPS]) {
  const unsigned ones = pack<Element>(1.f, 1.f);
#pragma unroll
  for (int b = 0; b < TILE_BLOCKS; ++b) {
    unsigned value[V_STEPS][4], weight[GROUPS][2];
#pragma unroll
    for (int step = 0; step < V_STEPS; ++step)
      ldmatrix_x4_transposed(value[step], values[step] + b * (BLOCK_COLUMNS * V::TOKEN));
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
      const int own = b - g * STEP;
      if (own < 0 || own >= BLOCKS) continue;
      const float(&c)[4] = p[g][own];
#pragma unroll
      for (int h = 0; h < 2; ++h) weight[g][h] = movmatrix_transposed(pack<Element>(c[2 * h], c[2 * h + 1]));
#pragma unroll
      for (int step = 0; step < V_STEPS; ++step)
        Mma<Element>::m16n8k16(o[g][step], value[step][0], value[step][1], value[step][2], value[step][3],
                               weight[g][0], weight[g][1], o[g][step]);
      Mma<Element>::m16n8k16(sum[g], ones, ones, ones, ones, weight[g][0], weight[g][1], sum[g]);
    }
  }
}

// O of a group, divided by `sum`, into 8 rows of the warp's stage.
__device__ __forceinline__ void stage_output(unsigned char* stage, const float (&o)[V_STEPS][4], const float (&sum)[4],
                                             int lane) {
  float inverse[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) inverse[e] = rcp_approx(sum[e]);
#pragma unroll
  for (int step = 0; step < V_STEPS; ++step) {
    unsigned r[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) r[h] = pack<Element>(o[step][2 * h] * inverse[0], o[step][2 * h + 1] * inverse[1]);
#if __CUDA_ARCH__ >= 900
    const int query = lane % 8;
    const int chunk = OutRows::chunk(query, 2 * step + lane / 8 % 2);
    stmatrix_x2_transposed(shared_address(stage) + query * OutRows::PITCH + chunk, r);
#else
#pragma unroll
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<unsigned*>(stage + lane / 4 * OutRows::PITCH + OutRows::chunk(lane / 4, 2 * step + h) +
                                   lane % 4 * 4) =
          movmatrix_transposed(r[h]);
#endif
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    marching_forward(const Element* __restrict__ q,        // [batch, x0, x1, heads, HEAD_DIM]
                     const Element* __restrict__ k,        // [batch, x0, x1, heads / heads_per_kv, HEAD_DIM]
                     const Element* __restrict__ v,        // [batch, x0, x1, heads / heads_per_kv, HEAD_DIM_V]
                     const BiasElement* __restrict__ rpb,  // [heads, 2 k0 - 1, 2 k1 - 1]
                     Element* __restrict__ out,            // [batch, x0, x1, heads, HEAD_DIM_V]
                     float* __restrict__ lse,              // [batch, x0, x1, heads], or null
                     float scale, const __grid_constant__ Params params) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Sizes& sizes = params.sizes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_head = blockIdx.x % sizes.head_groups * HEADS, slice = blockIdx.x / sizes.head_groups;
  const long long items = static_cast<long long>(sizes.batch) * DILATION_0 * DILATION_1 * sizes.strips * sizes.bands;
  const int begin = static_cast<int>(items * slice / sizes.slices);
  const int end = static_cast<int>(items * (slice + 1) / sizes.slices);
  const unsigned base = shared_address(shared);
  const Barriers barriers{base + BARRIERS_AT};
  const ScaleParts parts(scale);

  if (threadIdx.x < RING) {
    mbarrier_init(barriers.full(threadIdx.x), 32 * PRODUCERS);
    mbarrier_init(barriers.empty(threadIdx.x), CONSUMERS);
  } else if (threadIdx.x < RING + QUERY_RING) {
    mbarrier_init(barriers.queries_full(threadIdx.x - RING), 32 * PRODUCERS);
    mbarrier_init(barriers.queries_empty(threadIdx.x - RING), CONSUMERS);
  }
  clear_rest<HEAD_DIM, K::TOKEN>(shared, K_END);
  clear_rest<HEAD_DIM_V, V::TOKEN>(shared + K_END, Q_AT - K_END);
  clear_rest<HEAD_DIM, K::TOKEN>(shared + Q_AT, OUT_AT - Q_AT);
  if (MARGIN > 0) {
    clear_margins<K>(shared + K_AT);
    clear_margins<V>(shared + V_AT);
  }
  __syncthreads();

  if (warp >= CONSUMERS) {
    produce(base, barriers, q, k, v, params, first_head, begin, end, warp - CONSUMERS, lane);
    return;
  }
  fill_tables(reinterpret_cast<float*>(shared + TABLE_AT), rpb + static_cast<long long>(first_head) * params.rpb.head,
              params.rpb, parts.bias);

  const int head = warp / TILES, number = warp % TILES;
  const int row = lane / 4, pair = lane % 4 * 2;  // this lane's key of 8 and its first query of a group
  // Lanes of ldmatrix: K as A operand and V as its transpose; which key of a block, which 16 bytes of it.
  constexpr bool TALL = BLOCK_ROWS == 16;
  const int key_half = lane / 8 % 2, value_half = lane / 16;
  const int key_lane = head * (D_STEPS * 32) + lane / 16 * 16 + (TALL ? 0 : key_half * K::TOKEN);
  const int value_lane = head * (V_STEPS * 32) + lane / 8 % 2 * 16 + (TALL ? 0 : value_half * V::TOKEN);
  unsigned char* stage = shared + OUT_AT + warp * OUT_STAGE;
  const float* tables = reinterpret_cast<const float*>(shared + TABLE_AT) + head * 2 * TABLE;

  // What this lane stores of a tile, from its first row and column on.
  constexpr int CHUNKS = HEAD_DIM_V / 8, STORES = (GROUPS * 8 * CHUNKS + 31) / 32;
  const int lse_row = (pair + row % 2) % BAND, lse_column = row / 2 * GROUP_COLUMNS + (pair + row % 2) / BAND;
  const int lse_offset = lse_row * params.lse.step[0] + lse_column * params.lse.step[1];
  const auto stored_row = [&](int i) { return (lane + 32 * i) / CHUNKS % BAND; };
  const auto stored_column = [&](int i) {
    const int token = (lane + 32 * i) / CHUNKS;
    return token / 8 * GROUP_COLUMNS + token % 8 / BAND;
  };
  int offset[STORES];
#pragma unroll
  for (int i = 0; i < STORES; ++i)
    offset[i] = stored_row(i) * params.out.step[0] + stored_column(i) * params.out.step[1] +
                (lane + 32 * i) % CHUNKS * 8;

  Turn<RING> ready, held;  // the next stage to wait for; the first that is not given back
  Turn<QUERY_RING> turn;
#pragma unroll 1
  for (int item = begin; item < end;) {
    const Run run(sizes, item, end);
    item = run.next;
    if (run.last < run.first) continue;
    const Tile tile(run, number);
    unsigned lacks[GROUPS][2] = {};
    if (tile.clamped) {
#pragma unroll
      for (int g = 0; g < GROUPS; ++g)
        lacking(lacks[g], tile.group(g), tile.block(g, run.length[1]), run.length[1], lane);
    }
    const int block = tile.block(0, run.length[1]);
    const float* table = tables + (tile.clamped ? TABLE : 0) + block - tile.x - LEAST_DIFFERENCE - pair / BAND;
    const int key_byte = key_lane + (block - run.origin()) * K::TOKEN;
    const int value_byte = value_lane + (block - run.origin()) * V::TOKEN;
    const int query_byte = (tile.x - run.start + lane % 8 / BAND) * QueryRows::TOKEN + head * (D_STEPS * 32);
    const long long x = tile.x;
    Element* its_out = run.base(out, params.out, first_head + head) + x * params.out.step[1];
    float* its_lse = run.base(lse, params.lse, first_head + head) + x * params.lse.step[1];
    // Which of its stores lie in columns that are this tile's.
    const auto owns = [&](int column) { return tile.owned <= tile.x + column && tile.x + column < run.length[1]; };
    bool stores[STORES];
#pragma unroll
    for (int i = 0; i < STORES; ++i) stores[i] = lane + 32 * i < GROUPS * 8 * CHUNKS && owns(stored_column(i));
    const bool stores_lse = lse != nullptr && row < 2 * GROUPS && owns(lse_column);
    Interval rows = run.rows_of(run.first);
    int least = stage_of(rows.start), most = least;  // stages held: [least, most)

#pragma unroll 1
    for (int band = run.first; band <= run.last; ++band) {
      const int y = band * BAND;
      for (; most <= stage_of(rows.end - 1); ++most, ready.advance())
        mbarrier_wait(barriers.full(ready.slot), ready.phase);
      mbarrier_wait(barriers.queries_full(turn.slot), turn.phase);
      unsigned query[GROUPS][2 * D_STEPS];
#pragma unroll
      for (int g = 0; g < GROUPS; ++g)
        load_queries(query[g], base + Q_AT + (turn.slot * BAND + lane % 8 % BAND) * QueryRows::PITCH,
                     query_byte + g * GROUP_COLUMNS * QueryRows::TOKEN, parts.query, lane);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(barriers.queries_empty(turn.slot));
      turn.advance();
      if (tile.exists) {
        // Where keys lie; list rows beyond the band's last are masked copies of it.
        unsigned keys[D_STEPS], values[V_STEPS];
        const auto ring_row = [&](int y) {
          const int at = y + SHIFT + (held.slot - least) * BAND;
          return at < RING * BAND ? at : at - RING * BAND;
        };
        const int key_row = smaller(rows.start + lane % 8 + (TALL ? 8 * key_half : 0), rows.end - 1);
        const int value_row = smaller(rows.start + lane % 8 + (TALL ? 8 * value_half : 0), rows.end - 1);
#pragma unroll
        for (int step = 0; step < D_STEPS; ++step)
          keys[step] = base + K_AT + ring_row(key_row) * K::PITCH + K::at(key_byte + step * 32, key_row);
#pragma unroll
        for (int step = 0; step < V_STEPS; ++step)
          values[step] = base + V_AT + ring_row(value_row) * V::PITCH + V::at(value_byte + step * 32, value_row);
        const float* bias[2][2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int mine = y + (pair + e) % BAND;
          const Interval seen = keys_of(window_of(0), smaller(mine, run.length[0] - 1), run.length[0]);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int key = rows.start + row + (TALL ? 8 * h : 0);
            const int at = seen.start <= key && key < seen.end ? key - mine + KERNEL_0 - 1 : MASKED_ROW;
            bias[e][h] = table + at * TABLE_ROW + (TALL ? 0 : h);
          }
        }
        Scores s;
        if (tile.clamped) {
          score<true>(s, query, keys, bias, lacks, lane);
        } else {
          score<false>(s, query, keys, bias, lacks, lane);
        }
        float top[GROUPS][2], sum[GROUPS][4] = {}, o[GROUPS][V_STEPS][4] = {};
        soften(s, top, parts.unit);
        weigh(o, sum, s, values);
        __syncwarp();  // the stage has been read
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) stage_output(stage + g * 8 * OutRows::PITCH, o[g], sum[g], lane);
        __syncwarp();
        Element* target = its_out + static_cast<long long>(y) * params.out.step[0];
#pragma unroll
        for (int i = 0; i < STORES; ++i) {
          const int token = (lane + 32 * i) / CHUNKS, chunk = (lane + 32 * i) % CHUNKS;
          if (stores[i] && y + stored_row(i) < run.length[0])
            *reinterpret_cast<uint4*>(target + offset[i]) =
                *reinterpret_cast<const uint4*>(stage + token * OutRows::PITCH + OutRows::chunk(token, chunk));
        }
        if (stores_lse && y + lse_row < run.length[0]) {
          float most_of = top[0][0], total = sum[0][0];
#pragma unroll
          for (int i = 1; i < 2 * GROUPS; ++i)
            if (row == i) most_of = top[i / 2][i % 2], total = sum[i / 2][i % 2];
          its_lse[static_cast<long long>(y) * params.lse.step[0] + lse_offset] =
              (most_of * parts.unit + lg2_approx(total)) * LN_2;
        }
      }
      __syncwarp();
      if (band < run.last) rows = run.rows_of(band + 1);
      const int keep = band < run.last ? stage_of(rows.start) : most;
      for (; least < keep; ++least, held.advance())
        if (lane == 0) mbarrier_arrive(barriers.empty(held.slot));
    }
  }
}
