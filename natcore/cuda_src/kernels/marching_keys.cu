// Neighbourhood attention, backward of keys, on tensor cores: small two-dimensional windows, 16-bit elements.
//
// The mirror image of marching_queries.cu: a warp's own tokens are keys, and the rows that come by those of the queries
// that see them, with output gradients and the scalars that marching_queries.cu wrote. Producers that are done sum up
// drpb.
//
//   S = Q K^T, dP = dO V^T + d_lse - delta, P = exp(S - lse), dS = P dP, dV^T += dO^T P, dK^T += Q^T dS
//
// Keys near a border are seen by more queries than others, because windows are clamped there: a band's queries may take
// two rows of blocks, and groups within a window of a border take more blocks of columns than others, or fewer.
//
// Shared memory (NAT-Tiny, 56x56, strips of 56 columns with one head, two blocks an SM, RING 6): rings of Q and dO,
// RING * BAND rows of COLUMNS tokens of HEADS heads, 84 KB, and of scalars, 5 KB; OWN_RING bands of K and V, 14 KB;
// half a stage for each warp, by which results reach 16-byte stores, 4 KB; two bias tables a head, 4 KB; what warps and
// lanes keep of their run, 1 KB; barriers.
#include "common/strip_bias.cuh"
#include "common/strip_loads.cuh"
#include "common/strip_tile.cuh"
#include "ptx/math.cuh"

struct Params {
  Sizes sizes;
  Layout d_out, q, k, v, rpb, dk, dv, drpb;
  int slices;  // of drpb's partial sums
};

// What a tile's products read: where this lane's query of the first block lies, for each step, as an operand of S and
// dP and transposed for dK and dV; the scalars of the lane's two queries; the bias of the first block's first column.
struct Seen {
  unsigned queries[D_STEPS], queries_transposed[D_STEPS], gradients[V_STEPS], gradients_transposed[V_STEPS];
  const float2* scalars[2];
};

// What a warp keeps of its run in shared memory, because registers are scarce: where dk and dv of the tile's first
// column lie, the run's last band, the item after it, and the tile's first column within the strip.
struct Place {
  Element *dk, *dv;
  int last, next, column;
};
static_assert(sizeof(Place) <= PLACE, "");

struct Results {
  float dk[GROUPS][D_STEPS][4] = {}, dv[GROUPS][V_STEPS][4] = {};
};

// Adds to dK^T and dV^T of a tile what one row of blocks gives.
struct Differentiate {
  template <int KIND>
  static __device__ __forceinline__ void run(Results& results, const Seen& seen, const BiasRows& bias,
                                             const unsigned (&key)[GROUPS][2 * D_STEPS],
                                             const unsigned (&value)[GROUPS][2 * V_STEPS],
                                             const volatile unsigned& lacks, const float& unit, const int& its_lane) {
    const int lane = KIND == INNER ? its_lane : anew_lane(its_lane);
    unsigned mask[GROUPS][2];
    as_masks(mask, KIND == INNER ? 0 : lacks);
#pragma unroll
    for (int b = 0; b < blocks_of(KIND); ++b) {
      if (!is_taken(KIND, b)) continue;
      unsigned query[D_STEPS][4], gradient[V_STEPS][4], query_t[D_STEPS][4], gradient_t[V_STEPS][4];
      load_block(query, seen.queries, b * SeenD::BLOCK);
      load_block(gradient, seen.gradients, b * SeenV::BLOCK);
      const float2 scalars[2] = {seen.scalars[0][b * BLOCK_COLUMNS], seen.scalars[1][b * BLOCK_COLUMNS]};
      const float minus_delta[4] = {scalars[0].y, scalars[0].y, scalars[1].y, scalars[1].y};
      load_transposed(gradient_t, seen.gradients_transposed, b * SeenV::BLOCK);
      load_transposed(query_t, seen.queries_transposed, b * SeenD::BLOCK);
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        if (!takes(KIND, g, b)) continue;
        float p[4], ds[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) p[i] = bias.at[i % 2][i / 2][b * BLOCK_COLUMNS - g * GROUP_COLUMNS];
        if (KIND != INNER) mask_columns(p, b, mask[g], lane);
        multiply<Element>(p, query, key[g], p);
        multiply<Element>(ds, gradient, value[g], minus_delta);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p[i] = ex2_approx(__fmaf_rn(p[i], unit, -scalars[i / 2].x));
          ds[i] *= p[i];
        }
        unsigned weight[2], operand[2];
        as_operand(weight, p);
        as_operand(operand, ds);
        multiply_transposed<Element>(results.dv[g], gradient_t, weight);
        multiply_transposed<Element>(results.dk[g], query_t, operand);
      }
    }
  }
};

// One result of a tile, group by group through the warp's stage, to where the tile's first row and column lie.
template <int D, int STEPS>
__device__ __forceinline__ void store(Element* target, const Layout& layout, const Stores<D>& its, const Tile& tile,
                                      const float (&result)[GROUPS][STEPS][4], float scale, unsigned char* stage,
                                      int rows, int lane) {
  const float factor[2] = {scale, scale};
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    if (g >= tile.groups()) break;
    __syncwarp();  // the stage has been read
    stage_group(stage, result[g], factor, lane);
    __syncwarp();
    its.write(target, layout, stage, g, tile, rows);
  }
}

// drpb from the partial sums of marching_queries.cu, 8 entries at a time, by a warp with nothing else to do; the blocks
// share them out. A lane adds every fourth slice, then four lanes add up: always in the same order.
__device__ __forceinline__ void sum_bias(BiasElement* drpb, const float* partials, const Layout& s, int heads,
                                         int slices, int lane) {
  const int count = heads * ENTRIES;
#pragma unroll 1
  for (int first = blockIdx.x * 8; first < count; first += gridDim.x * 8) {
    const int i = first + lane % 8;
    float sum = 0.f;
    if (i < count) {
#pragma unroll 8
      for (int slice = lane / 8; slice < slices; slice += 4) sum += partials[static_cast<long long>(slice) * count + i];
    }
    sum += __shfl_xor_sync(~0u, sum, 8);
    sum += __shfl_xor_sync(~0u, sum, 16);
    const int entry = i % ENTRIES, row = entry / COLUMN_DIFFERENCES, column = entry % COLUMN_DIFFERENCES;
    if (i < count && lane < 8)
      drpb[static_cast<long long>(i / ENTRIES) * s.head + row * s.axis[0] + column * s.axis[1]] =
          narrow<BiasElement>(sum);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    marching_keys(const Element* __restrict__ d_out,    // [batch, x0, x1, heads, HEAD_DIM_V]
                  const Element* __restrict__ q,        // [batch, x0, x1, heads, HEAD_DIM]
                  const Element* __restrict__ k,        // [batch, x0, x1, heads, HEAD_DIM]
                  const Element* __restrict__ v,        // [batch, x0, x1, heads, HEAD_DIM_V]
                  const float2* __restrict__ scalars,   // [batch, heads, x0, x1]: {log2(e) lse, d_lse - delta}
                  const BiasElement* __restrict__ rpb,  // [heads, 2 k0 - 1, 2 k1 - 1]
                  Element* __restrict__ dk,             // [batch, x0, x1, heads, HEAD_DIM], or null
                  Element* __restrict__ dv,             // [batch, x0, x1, heads, HEAD_DIM_V], or null
                  BiasElement* __restrict__ drpb,       // [heads, 2 k0 - 1, 2 k1 - 1], or null
                  const float* __restrict__ drpb_partials,  // [slices, heads, 2 k0 - 1, 2 k1 - 1]
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
    const Source values{v, params.v, 1};
    const Sources from{{q, params.q, 1}, {d_out, params.d_out, 1}, {k, params.k, 1}, values, values,
                       scalars, nullptr, nullptr, params.v, params.v};
    produce(base, barriers, from, sizes, first_head, share.start, share.end, warp - CONSUMERS, lane);
    if (drpb != nullptr && warp == CONSUMERS)
      sum_bias(drpb, drpb_partials, params.drpb, sizes.head_groups * HEADS, params.slices, lane);
    return;
  }
  prepare_shared(shared, sizes);
  fill_tables(reinterpret_cast<float*>(shared + TABLE_AT), rpb + static_cast<long long>(first_head) * params.rpb.head,
              params.rpb, parts.bias);

  const int head = warp / TILES, number = warp % TILES;
  unsigned char* stage = shared + OUT_AT + warp * OUT_STAGE;
  const float* tables = reinterpret_cast<const float*>(shared + TABLE_AT) + head * 2 * TABLE;

  // The columns that a lane's key lacks, kept there.
  const auto kept = [&](int lane) -> volatile unsigned& {
    return reinterpret_cast<volatile unsigned*>(shared + KEPT_AT)[warp * 32 + lane];
  };
  volatile Place& place = *reinterpret_cast<volatile Place*>(shared + PLACES_AT + warp * PLACE);

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
    kept(lane) = lacking(tile, run.length[1], lane);
    const float* its_table = tables + (tile.kind == INNER ? 0 : TABLE) + block - tile.x - LEAST_DIFFERENCE;
    const long long x = tile.x;
    __syncwarp();
    if (lane == 0) {
      place.dk = run.base(dk, params.dk, first_head + head) + x * params.dk.step[1];
      place.dv = run.base(dv, params.dv, first_head + head) + x * params.dv.step[1];
      place.column = tile.x - run.start;
    }
    __syncwarp();
    Interval rows = run.rows_of(run.first);
    int least = stage_of(rows.start), most = least;  // stages held: [least, most)

#pragma unroll 1
    for (int band = run.first; band <= place.last; ++band) {
      const int y = band * BAND;
      mbarrier_wait(barriers.own_full(turn.slot), turn.phase);
      unsigned key[GROUPS][2 * D_STEPS], value[GROUPS][2 * V_STEPS];
      const int lane = anew_lane(its_lane);  // what depends on it is not worth a register from band to band
      const int own_row = turn.slot * BAND + lane % 8 % BAND, own_column = place.column + lane % 8 / BAND;
      const int key_byte = own_column * OwnD::TOKEN + head * (D_STEPS * 32);
      const int value_byte = own_column * OwnV::TOKEN + head * (V_STEPS * 32);
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
        if (g >= tile.groups()) break;
        load_own<OwnD, D_STEPS>(key[g], base + OWN_D_AT + own_row * OwnD::PITCH,
                                key_byte + g * GROUP_COLUMNS * OwnD::TOKEN, parts.query, lane);
        load_own<OwnV, V_STEPS>(value[g], base + OWN_V_AT + own_row * OwnV::PITCH,
                                value_byte + g * GROUP_COLUMNS * OwnV::TOKEN, 1.f, lane);
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(barriers.own_empty(turn.slot));
      turn.advance();
      for (; most <= stage_of(rows.end - 1); ++most, ready.advance())
        mbarrier_wait(barriers.full(ready.slot), ready.phase);
      if (tile.exists) {
        Results results;
        const int first = SHIFT + (held.slot - least) * BAND;
#pragma unroll 1
        for (Interval list = rows; list.start < list.end; list.start += BLOCK_ROWS) {
          Seen seen;
          BiasRows bias;
          // Lanes of ldmatrix: Q and dO as A operands, and their transposes; which query of a block, which 16 bytes.
          const int half = lane / 8 % 2, transposed_half = lane / 16, first_column = block - run.origin();
          const int column = first_column + (TALL ? 0 : half), column_t = first_column + (TALL ? 0 : transposed_half);
          const int d_byte = column * SeenD::TOKEN + head * (D_STEPS * 32) + lane / 16 * 16;
          const int v_byte = column * SeenV::TOKEN + head * (V_STEPS * 32) + lane / 16 * 16;
          const int d_byte_t = column_t * SeenD::TOKEN + head * (D_STEPS * 32) + lane / 8 % 2 * 16;
          const int v_byte_t = column_t * SeenV::TOKEN + head * (V_STEPS * 32) + lane / 8 % 2 * 16;
          const int scalar_byte = (head * COLUMNS + first_column) * 8;
          const int query = lane % 8 + (TALL ? 8 * half : 0), query_t = lane % 8 + (TALL ? 8 * transposed_half : 0);
          find_seen<SeenD>(seen.queries, base + SEEN_D_AT, d_byte, list, query, first);
          find_seen<SeenV>(seen.gradients, base + SEEN_V_AT, v_byte, list, query, first);
          find_seen<SeenD>(seen.queries_transposed, base + SEEN_D_AT, d_byte_t, list, query_t, first);
          find_seen<SeenV>(seen.gradients_transposed, base + SEEN_V_AT, v_byte_t, list, query_t, first);
          bias.turn_to(run, band, list, its_table, anew_lane(lane));
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int place = smaller(list.start + lane / 4 + (TALL ? 8 * h : 0), list.end - 1) + first;
            const int at = (place < SEEN_ROWS ? place : place - SEEN_ROWS) * SCALARS_ROW + scalar_byte;
            seen.scalars[h] = reinterpret_cast<const float2*>(shared + SCALARS_AT + at) + (TALL ? 0 : h);
          }
          of_kind<Differentiate>(tile.kind, results, seen, bias, key, value, kept(lane), parts.unit, lane);
        }
        const int left = run.length[0] - y;
        const Stores<HEAD_DIM> its_dk(params.dk, anew_lane(its_lane));
        const Stores<HEAD_DIM_V> its_dv(params.dv, anew_lane(its_lane));
        if (dk != nullptr)
          store(place.dk + static_cast<long long>(y) * params.dk.step[0], params.dk, its_dk, tile, results.dk, scale,
                stage, left, anew_lane(its_lane));
        if (dv != nullptr)
          store(place.dv + static_cast<long long>(y) * params.dv.step[0], params.dv, its_dv, tile, results.dv, 1.f,
                stage, left, anew_lane(its_lane));
      }
      __syncwarp();
      const bool more = band < place.last;
      if (more) rows = run.rows_of(band + 1);
      const int keep = more ? stage_of(rows.start) : most;
      for (; least < keep; ++least, held.advance())
        if (lane == 0) mbarrier_arrive(barriers.empty(held.slot));
    }
  }
}
