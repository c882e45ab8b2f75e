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
// Shared memory (NAT-Tiny, 56x56, strips of 56 columns with one head, two blocks an SM, RING 6): rings of K and V,
// RING * BAND rows of COLUMNS tokens of HEADS heads, 84 KB; QUERY_RING bands of Q, 14 KB; a stage for each warp, by
// which results reach 16-byte stores, 7 KB; two bias tables a head, 3 KB; barriers.
#include "common/strip_loads.cuh"
#include "common/strip_products.cuh"

struct Params {
  Sizes sizes;
  Layout q, k, v, rpb, out, lse;
};

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
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), its_lane = threadIdx.x % 32;
  const int first_head = blockIdx.x % sizes.head_groups * HEADS, slice = blockIdx.x / sizes.head_groups;
  const Interval share = share_of(sizes, slice);
  const unsigned base = shared_address(shared);
  const Barriers barriers{base + BARRIERS_AT};
  const ScaleParts parts(scale);

  if (warp >= CONSUMERS) {
    const Source queries{q, params.q, 1};
    const Sources from{{k, params.k, sizes.heads_per_kv}, {v, params.v, sizes.heads_per_kv}, queries, queries, queries,
                       nullptr, nullptr, nullptr, params.lse, params.lse};
    produce(base, barriers, from, sizes, first_head, share.start, share.end, warp - CONSUMERS, its_lane);
    return;
  }
  prepare_shared(shared, sizes);
  fill_tables(reinterpret_cast<float*>(shared + TABLE_AT), rpb + static_cast<long long>(first_head) * params.rpb.head,
              params.rpb, parts.bias);

  unsigned char* stage = shared + OUT_AT + warp * OUT_STAGE;
  Turn<RING> ready, held;  // the next stage to wait for; the first that is not given back
  Turn<OWN_RING> turn;
#pragma unroll 1
  for (int item = share.start; item < share.end;) {
    const Run run(sizes, item, share.end);
    item = run.next;
    if (run.last < run.first) continue;
    const Tile tile(run, warp % TILES);
    // What depends on them is made once a run: not before, not once a band.
    const int head = anew(warp / TILES), lane = anew_lane(its_lane);
    const float* tables = reinterpret_cast<const float*>(shared + TABLE_AT) + head * 2 * TABLE;
    const int row = lane / 4, pair = lane % 4 * 2;  // this lane's key of 8 and its first query of a group
    // Lanes of ldmatrix: K as A operand and V as its transpose; which key of a block, which 16 bytes of it.
    const int key_half = lane / 8 % 2, value_half = lane / 16;
    const int key_lane = head * (D_STEPS * 32) + lane / 16 * 16 + (TALL ? 0 : key_half * SeenD::TOKEN);
    const int value_lane = head * (V_STEPS * 32) + lane / 8 % 2 * 16 + (TALL ? 0 : value_half * SeenV::TOKEN);
    const Stores<HEAD_DIM_V> its(params.out, lane);
    const int lse_row = (pair + row % 2) % BAND, lse_column = row / 2 * GROUP_COLUMNS + (pair + row % 2) / BAND;
    const int lse_offset = lse_row * params.lse.step[0] + lse_column * params.lse.step[1];
    const unsigned lacks = anew(lacking(tile, run.length[1], lane));
    const int block = tile.block(0, run.length[1]);
    const float* table = tables + (tile.kind == INNER ? 0 : TABLE) + block - tile.x - LEAST_DIFFERENCE;
    const int key_byte = key_lane + (block - run.origin()) * SeenD::TOKEN;
    const int value_byte = value_lane + (block - run.origin()) * SeenV::TOKEN;
    const int query_byte = (tile.x - run.start + lane % 8 / BAND) * OwnD::TOKEN + head * (D_STEPS * 32);
    const long long x = tile.x;
    Element* its_out = run.base(out, params.out, first_head + head) + x * params.out.step[1];
    float* its_lse = run.base(lse, params.lse, first_head + head) + x * params.lse.step[1];
    const bool stores_lse = lse != nullptr && row < 2 * GROUPS && tile.owns(lse_column);
    BiasRows bias;
    Interval rows = run.rows_of(run.first);
    int least = stage_of(rows.start), most = least;  // stages held: [least, most)

#pragma unroll 1
    for (int band = run.first; band <= run.last; ++band) {
      const int y = band * BAND;
      for (; most <= stage_of(rows.end - 1); ++most, ready.advance())
        mbarrier_wait(barriers.full(ready.slot), ready.phase);
      mbarrier_wait(barriers.own_full(turn.slot), turn.phase);
      unsigned query[GROUPS][2 * D_STEPS];
#pragma unroll
      for (int g = 0; g < GROUPS; ++g)
        if (g < tile.groups())
          load_own<OwnD, D_STEPS>(query[g], base + OWN_D_AT + (turn.slot * BAND + lane % 8 % BAND) * OwnD::PITCH,
                                  query_byte + g * GROUP_COLUMNS * OwnD::TOKEN, parts.query, lane);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(barriers.own_empty(turn.slot));
      turn.advance();
      if (tile.exists) {
        unsigned keys[D_STEPS], values[V_STEPS];
        const int first = SHIFT + (held.slot - least) * BAND;
        find_seen<SeenD>(keys, base + SEEN_D_AT, key_byte, rows, lane % 8 + (TALL ? 8 * key_half : 0), first);
        find_seen<SeenV>(values, base + SEEN_V_AT, value_byte, rows, lane % 8 + (TALL ? 8 * value_half : 0), first);
        bias.turn_to(run, band, rows, table, lane);
        float top[GROUPS][2] = {}, sum[GROUPS][4] = {}, o[GROUPS][V_STEPS][4] = {};
        of_kind<Attend>(tile.kind, o, sum, top, query, keys, values, bias.at, lacks, parts.unit, lane);
        __syncwarp();  // the stage has been read
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
          if (g >= tile.groups()) break;
          const float inverse[2] = {rcp_approx(sum[g][0]), rcp_approx(sum[g][1])};
          stage_group(stage + g * 8 * OutRows::PITCH, o[g], inverse, lane);
        }
        __syncwarp();
#pragma unroll
        for (int g = 0; g < GROUPS; ++g)
          if (g < tile.groups())
            its.write(its_out + static_cast<long long>(y) * params.out.step[0], params.out,
                      stage + g * 8 * OutRows::PITCH, g, tile, run.length[0] - y);
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
