// Neighbourhood attention, backward of queries, on tensor cores: small two-dimensional windows, 16-bit elements.
//
// A block marches down strips of the map as marching_forward.cu does, with the same tiles; with the queries come their
// output gradients. The LSE is known, so nothing waits for a maximum: blocks of keys go by one after the other.
//
//   S^T = K Q^T, dP^T = V dO^T - delta, P = exp(S - lse), dS = P dP, dQ^T += K^T dS^T
//
// delta = dO . O comes from O, which comes with the queries. {lse, d_lse - delta} are written for marching_keys.cu,
// which makes dk and dv. dS is summed for drpb in registers (common/strip_sums.cuh), then over warps, then over blocks
// by marching_keys.cu: all in a fixed order.
//
// Shared memory (NAT-Tiny, 56x56, strips of 56 columns with one head, two blocks an SM, RING 5): rings of K and V,
// RING * BAND rows of COLUMNS tokens of HEADS heads, 70 KB; OWN_RING bands of Q, dO and O, 21 KB, and of lse; a stage
// for each warp, by which dq reaches 16-byte stores, 7 KB; two bias tables a head, 3 KB; sums of drpb for each warp,
// 5 KB; what warps and lanes keep of their run, 4 KB; barriers.
#include "common/strip_bias.cuh"
#include "common/strip_loads.cuh"
#include "common/strip_sums.cuh"
#include "common/strip_tile.cuh"
#include "ptx/math.cuh"

struct Params {
  Sizes sizes;
  Layout d_out, q, k, v, out, lse, d_lse, rpb, dq;
};

// What a warp keeps of its run in shared memory, because registers are scarce: where dq and the scalars of the tile's
// first column lie, the run's last band, the item after it, and the tile's first column within the strip.
struct Place {
  Element* dq;
  float2* scalars;
  int last, next, column;
};
static_assert(sizeof(Place) <= PLACE, "");

// In which row of delta's product a query of a group goes, and which query goes in a row: rows 2 n and 2 n + 1, which
// are read at once, lie in different halves of 128 bytes (see OwnRows).
__device__ __forceinline__ int delta_row(int query) {
  constexpr int BIT = BAND == 2 && OwnV::TOKEN < 128 ? 1 : 2;  // changes places with bit 0
  const int differ = (query ^ query >> BIT) & 1;
  return query ^ (differ | differ << BIT);
}

// delta of query delta_row(lane / 4) of a group, in the lanes of which lane % 4 is half of lane / 4: dO . O, the
// diagonal of a product. `gradients` and `outputs` are the rows of that query, the band's row `row`, `byte` is where it
// lies in them.
__device__ __forceinline__ float find_delta(const unsigned char* gradients, const unsigned char* outputs, int byte,
                                            int row, int lane) {
  float c[4] = {};
#pragma unroll
  for (int turn = 0; turn < (V_STEPS + 1) / 2; ++turn) {  // four lanes have 16 bytes each
    const int chunk = lane % 4 * 16 + turn * 64;
    uint4 g{0, 0, 0, 0}, o{0, 0, 0, 0};
    if (V_STEPS % 2 == 0 || chunk < V_STEPS * 32) {
      const int at = OwnV::at(byte + chunk, row);
      g = *reinterpret_cast<const uint4*>(gradients + at), o = *reinterpret_cast<const uint4*>(outputs + at);
    }
    Mma<Element>::m16n8k16(c, g.x, 0, g.y, 0, o.x, o.y, c);
    Mma<Element>::m16n8k16(c, g.z, 0, g.w, 0, o.z, o.w, c);
  }
  return lane / 4 % 2 == 0 ? c[0] : c[1];
}

// What a tile's products read: where this lane's key of the first block lies, for each step, as an operand of S and dP
// and transposed for dQ, and the bias of the first block's first column.
struct Seen {
  unsigned keys[D_STEPS], keys_transposed[D_STEPS], values[V_STEPS];
};

// dQ^T of a tile and its share of the sums.
struct Differentiate {
  template <int KIND>
  static __device__ __forceinline__ void run(float (&dq)[GROUPS][D_STEPS][4], BiasSums& sums, const Seen& seen,
                                             const BiasRows& bias, const unsigned (&query)[GROUPS][2 * D_STEPS],
                                             const unsigned (&gradient)[GROUPS][2 * V_STEPS],
                                             const float (&lse)[GROUPS][2], const float (&minus_delta)[GROUPS][4],
                                             const volatile int& lacks, const float& unit, const int& its_lane) {
    const int lane = KIND == INNER ? its_lane : anew_lane(its_lane);
    unsigned mask[GROUPS][2];
    as_masks(mask, KIND == INNER ? 0 : lacks);
#pragma unroll
    for (int b = 0; b < blocks_of(KIND); ++b) {
      if (!is_taken(KIND, b)) continue;
      unsigned key[D_STEPS][4], value[V_STEPS][4], transposed[D_STEPS][4];
      load_block(key, seen.keys, b * SeenD::BLOCK);
      load_block(value, seen.values, b * SeenV::BLOCK);
      load_transposed(transposed, seen.keys_transposed, b * SeenD::BLOCK);
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        if (!takes(KIND, g, b)) continue;
        const int own = b - g * STEP;
        float s[4], ds[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) s[i] = bias.at[i % 2][i / 2][own * BLOCK_COLUMNS];
        if (KIND != INNER) mask_columns(s, own, mask[g], lane);
        multiply<Element>(s, key, query[g], s);
        multiply<Element>(ds, value, gradient[g], minus_delta[g]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ds[i] *= ex2_approx(__fmaf_rn(s[i], unit, -lse[g][i % 2]));
#ifdef RPB
          sums.sum[own][i] += ds[i];
#endif
        }
        unsigned operand[2];
        as_operand(operand, ds);
        multiply_transposed<Element>(dq[g], transposed, operand);
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    marching_queries(const Element* __restrict__ d_out,    // [batch, x0, x1, heads, HEAD_DIM_V]
                     const Element* __restrict__ q,        // [batch, x0, x1, heads, HEAD_DIM]
                     const Element* __restrict__ k,        // [batch, x0, x1, heads / heads_per_kv, HEAD_DIM]
                     const Element* __restrict__ v,        // [batch, x0, x1, heads / heads_per_kv, HEAD_DIM_V]
                     const Element* __restrict__ out,      // [batch, x0, x1, heads, HEAD_DIM_V]
                     const float* __restrict__ lse,        // [batch, x0, x1, heads]
                     const float* __restrict__ d_lse,      // [batch, x0, x1, heads], or null: zeros
                     const BiasElement* __restrict__ rpb,  // [heads, 2 k0 - 1, 2 k1 - 1]
                     Element* __restrict__ dq,             // [batch, x0, x1, heads, HEAD_DIM]
                     float2* __restrict__ scalars,         // [batch, heads, x0, x1]: {log2(e) lse, d_lse - delta}
                     float* __restrict__ drpb_partials,    // [slices, heads, 2 k0 - 1, 2 k1 - 1], or null
                     float scale, const __grid_constant__ Params params) {
  extern __shared__ __align__(128) unsigned char shared[];
  const Sizes& sizes = params.sizes;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), its_lane = threadIdx.x % 32, lane = its_lane;
  const int first_head = blockIdx.x % sizes.head_groups * HEADS, slice = blockIdx.x / sizes.head_groups;
  const Interval share = share_of(sizes, slice);
  const unsigned base = shared_address(shared);
  const Barriers barriers{base + BARRIERS_AT};
  const ScaleParts parts(scale);

  if (warp >= CONSUMERS) {
    const Sources from{{k, params.k, sizes.heads_per_kv}, {v, params.v, sizes.heads_per_kv}, {q, params.q, 1},
                       {d_out, params.d_out, 1}, {out, params.out, 1}, nullptr, lse, d_lse, params.lse, params.d_lse};
    produce(base, barriers, from, sizes, first_head, share.start, share.end, warp - CONSUMERS, lane);
    return;
  }
  prepare_shared(shared, sizes);
  for (int i = threadIdx.x; i < SUMS_BYTES / 4; i += 32 * CONSUMERS)
    reinterpret_cast<float*>(shared + SUMS_AT)[i] = 0.f;
  fill_tables(reinterpret_cast<float*>(shared + TABLE_AT), rpb + static_cast<long long>(first_head) * params.rpb.head,
              params.rpb, parts.bias);

  const int head = warp / TILES, number = warp % TILES;
  unsigned char* stage = shared + OUT_AT + warp * OUT_STAGE;
  const float* tables = reinterpret_cast<const float*>(shared + TABLE_AT) + head * 2 * TABLE;
  float* its_sums = reinterpret_cast<float*>(shared + SUMS_AT) + warp * SUMS;

  volatile Place& place = *reinterpret_cast<volatile Place*>(shared + PLACES_AT + warp * PLACE);
  // What a lane keeps of its run: where its keys, its values and its keys to be transposed lie in a row, and the
  // columns that its query lacks.
  const auto kept = [&](int i, int lane) -> volatile int& {
    return reinterpret_cast<volatile int*>(shared + KEPT_AT)[(warp * (KEPT / 4) + i) * 32 + lane];
  };
  BiasSums sums;
  Turn<RING> ready, held;  // the next stage to wait for; the first that is not given back
  Turn<OWN_RING> turn;
#pragma unroll 1
  for (int item = share.start; item < share.end; item = place.next) {
    const Run run(sizes, item, share.end);
    const int lane = anew_lane(its_lane);  // what depends on it is not worth a register from run to run
    __syncwarp();
    if (lane == 0) place.last = run.last, place.next = run.next;
    __syncwarp();
    if (run.last < run.first) continue;
    const Tile tile(run, number);
    const int block = tile.block(0, run.length[1]);
    const float* table = tables + (tile.kind == INNER ? 0 : TABLE) + block - tile.x - LEAST_DIFFERENCE;
    // Lanes of ldmatrix: K and V as A operands, and the transpose of K; which key of a block, which 16 bytes of it.
    const int key_half = lane / 8 % 2, transposed_half = lane / 16, first_column = block - run.origin();
    const int column = first_column + (TALL ? 0 : key_half), column_t = first_column + (TALL ? 0 : transposed_half);
    kept(0, lane) = column * SeenD::TOKEN + head * (D_STEPS * 32) + lane / 16 * 16;
    kept(1, lane) = column * SeenV::TOKEN + head * (V_STEPS * 32) + lane / 16 * 16;
    kept(2, lane) = column_t * SeenD::TOKEN + head * (D_STEPS * 32) + lane / 8 % 2 * 16;
    kept(3, lane) = lacking(tile, run.length[1], lane);
    const long long x = tile.x;
    const int its_head = first_head + head;
    if (lane == 0) {
      place.dq = run.base(dq, params.dq, its_head) + x * params.dq.step[1];
      place.scalars = scalars + scalars_at(sizes, run, its_head) + x * DILATION_1;
      place.column = tile.x - run.start;
    }
    __syncwarp();

    BiasRows bias;
    Interval rows = run.rows_of(run.first);
    int least = stage_of(rows.start), most = least;  // stages held: [least, most)

#pragma unroll 1
    for (int band = run.first; band <= place.last; ++band) {
      const int y = band * BAND;
      mbarrier_wait(barriers.own_full(turn.slot), turn.phase);
      unsigned query[GROUPS][2 * D_STEPS], gradient[GROUPS][2 * V_STEPS];
      // What depends on it is not worth a register from band to band.
      const int lane = anew_lane(its_lane), query_of_row = delta_row(lane / 4);
      const int own_row = turn.slot * BAND + lane % 8 % BAND, column = place.column;
      const int query_byte = (column + lane % 8 / BAND) * OwnD::TOKEN + head * (D_STEPS * 32);
      const int gradient_byte = (column + lane % 8 / BAND) * OwnV::TOKEN + head * (V_STEPS * 32);
      const int delta_byte = (column + query_of_row / BAND) * OwnV::TOKEN + head * (V_STEPS * 32);
      // The query whose scalars this lane makes.
      const int scalar_row = lane % 8 % BAND, scalar_column = lane / 8 % GROUPS * GROUP_COLUMNS + lane % 8 / BAND;
      const int scalar_byte = (head * STRIP + column + scalar_column) * 4;
      const int source = delta_row(lane % 8) * 4 + delta_row(lane % 8) / 2;
      float delta = 0.f;
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        if (g >= tile.groups()) break;
        load_own<OwnD, D_STEPS>(query[g], base + OWN_D_AT + own_row * OwnD::PITCH,
                                query_byte + g * GROUP_COLUMNS * OwnD::TOKEN, parts.query, lane);
        load_own<OwnV, V_STEPS>(gradient[g], base + OWN_V_AT + own_row * OwnV::PITCH,
                                gradient_byte + g * GROUP_COLUMNS * OwnV::TOKEN, 1.f, lane);
        const unsigned char* own = shared + (turn.slot * BAND + query_of_row % BAND) * OwnV::PITCH;
        const int at = delta_byte + g * GROUP_COLUMNS * OwnV::TOKEN;
        const float its = find_delta(own + OWN_V_AT, own + OWN_O_AT, at, query_of_row % BAND, lane);
        const float of_token = __shfl_sync(~0u, its, source);
        if (g == 0 || lane / 8 == g) delta = of_token;
      }
      // Token lane % 8 of group lane / 8 is this lane's, for now. Queries that are not the tile's, or below the map,
      // get a weight of exp(-inf).
      const bool present =
          lane < 8 * GROUPS && y + scalar_row < run.length[0] && tile.owns(scalar_column);
      const float* given = reinterpret_cast<const float*>(
          shared + SCALARS_AT + (turn.slot * BAND + scalar_row) * SCALARS_ROW + scalar_byte);
      float2 its_scalars{__int_as_float(0x7f800000), 0.f};
      if (present) {
        its_scalars.x = LOG2_E * given[0];
        its_scalars.y = (d_lse == nullptr ? 0.f : given[OWN_RING * BAND * SCALARS_ROW / 4]) - delta;
        place.scalars[static_cast<long long>(y + scalar_row) * DILATION_0 * sizes.extent[1] +
                      scalar_column * DILATION_1] = its_scalars;
      }
      // d_lse - delta goes twice into the stage, so that four loaded registers are what dP starts from.
      float* at_stage = reinterpret_cast<float*>(stage);
      if (lane < 8 * GROUPS) {
        at_stage[lane / 2 * 4 + lane % 2] = at_stage[lane / 2 * 4 + 2 + lane % 2] = its_scalars.y;
        at_stage[16 * GROUPS + lane] = its_scalars.x;
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(barriers.own_empty(turn.slot));
      turn.advance();
      float its_lse[GROUPS][2], minus_delta[GROUPS][4];
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        const float4 starts = reinterpret_cast<const float4*>(stage)[g * 4 + lane % 4];
        const float2 pair = reinterpret_cast<const float2*>(stage)[(2 * GROUPS + g) * 4 + lane % 4];
        its_lse[g][0] = pair.x, its_lse[g][1] = pair.y;
        minus_delta[g][0] = starts.x, minus_delta[g][1] = starts.y;
        minus_delta[g][2] = starts.z, minus_delta[g][3] = starts.w;
      }
      for (; most <= stage_of(rows.end - 1); ++most, ready.advance())
        mbarrier_wait(barriers.full(ready.slot), ready.phase);
      if (tile.exists) {
        Seen seen;
        const int first = SHIFT + (held.slot - least) * BAND, key = lane % 8 + (TALL ? lane / 8 % 2 * 8 : 0);
        find_seen<SeenD>(seen.keys, base + SEEN_D_AT, kept(0, lane), rows, key, first);
        find_seen<SeenV>(seen.values, base + SEEN_V_AT, kept(1, lane), rows, key, first);
        find_seen<SeenD>(seen.keys_transposed, base + SEEN_D_AT, kept(2, lane), rows,
                         lane % 8 + (TALL ? lane / 16 * 8 : 0), first);
        bias.turn_to(run, band, rows, table, lane);
#ifdef RPB
        sums.turn_to(rows.start - y, block - tile.x, its_sums, lane);
#endif
        float result[GROUPS][D_STEPS][4] = {};
        of_kind<Differentiate>(tile.kind, result, sums, seen, bias, query, gradient, its_lse, minus_delta,
                               kept(3, lane), parts.unit, lane);
        __syncwarp();  // the stage has been read
        const float factor[2] = {scale, scale};
#pragma unroll
        for (int g = 0; g < GROUPS; ++g)
          if (g < tile.groups()) stage_group(stage + g * 8 * OutRows::PITCH, result[g], factor, lane);
        __syncwarp();
        const Stores<HEAD_DIM> its(params.dq, anew_lane(lane));
        if (dq != nullptr)
#pragma unroll
          for (int g = 0; g < GROUPS; ++g)
            if (g < tile.groups())
              its.write(place.dq + static_cast<long long>(y) * params.dq.step[0], params.dq,
                        stage + g * 8 * OutRows::PITCH, g, tile, run.length[0] - y);
      }
      __syncwarp();
      const bool more = band < place.last;
      if (more) rows = run.rows_of(band + 1);
      const int keep = more ? stage_of(rows.start) : most;
      for (; least < keep; ++least, held.advance())
        if (lane == 0) mbarrier_arrive(barriers.empty(held.slot));
    }
  }

#ifdef RPB
  sums.flush(its_sums, lane);
  named_barrier_sync(1, 32 * CONSUMERS);
  if (drpb_partials == nullptr) return;
  for (int i = threadIdx.x; i < HEADS * ENTRIES; i += 32 * CONSUMERS) {
    const int of_head = i / ENTRIES, entry = i % ENTRIES;
    float sum = 0.f;
    for (int w = of_head * TILES; w < (of_head + 1) * TILES; ++w)
      sum += reinterpret_cast<const float*>(shared + SUMS_AT)[w * SUMS + entry];
    drpb_partials[(static_cast<long long>(slice) * sizes.head_groups * HEADS + first_head) * ENTRIES + i] = sum;
  }
#endif
}
