// Neighbourhood attention, forward, on tensor cores: small windows, 16-bit elements.
//
// A block owns a region of queries of one (batch entry, head, dilation group) and copies the region's
// halo, the union of its windows, into shared memory. A warp then owns tiles of 16 queries: the keys
// of a tile are gathered out of the halo by ldmatrix, whose row addresses are free, so that scores are
// computed only for the union of the tile's own windows.
//
//     halo of a region, 2 x 2 tiles        one tile of 4 x 4 queries, kernel 7 x 7
//     k k k k k k k k k k k k k k          + + + + + + + + + +     keys are numbered along the rows
//     k k k k k k k k k k k k k k          + + + + + + + + + +     of the tile's own halo, 0 to 99:
//     k k k k k k k k k k k k k k          + + + + + + + + + +     eight consecutive ones make an
//     k k k q q q q q q q q k k k          + + + Q Q Q Q + + +     n8 block of S = Q K^T. Row pitches
//     k k k q q q q q q q q k k k          + + + Q Q Q Q + + +     and the order of chunks in a slot
//     k k k q q q q q q q q k k k          + + + Q Q Q Q + + +     are such that the gather meets no
//       ...                                + + + Q Q Q Q + + +     bank of shared memory twice.
//     k k k k k k k k k k k k k k            ...
//
// Bias and mask are the accumulator that S starts from, in units of 1 / scale: for a tile whose windows
// are all unclamped, one table of differences key - query holds both; other tiles clear scores by bit
// masks. Scores stay in registers, CHUNK blocks at a time, with an online softmax where a tile has more.
//
// Shared memory, bytes: STAGES spans of K and V, SLOTS * (K_PITCH + V_PITCH) each; the difference tables,
// 4 * TABLES; a Tile for each tile; for each warp two tiles of Q: the one at hand, whose place later carries
// O to 16-byte stores, and the next one. (NAT-Tiny, 56x56: 95360 + 6816 + 1232 + 6 * 2048, two blocks an SM.)
#include "common/tile_mask.cuh"
#ifdef FLOAT32
#include "common/tile_products_float32.cuh"
#else
#include "common/tile_products.cuh"
#endif

struct Params {
  Sizes sizes;
  Layout q, k, v, rpb, out, lse;
};

// The accumulators of COUNT blocks from block FIRST on, for which S = Q K^T is then added.
template <int FIRST, int COUNT>
__device__ __forceinline__ void start(float (&s)[COUNT][4], bool interior, const TileMask& mask, const float* bias,
                                      int lane) {
  unsigned words[2];
  if (interior) {
#pragma unroll
    for (int j = 0; j < COUNT; ++j) initial_scores<true>(s[j], FIRST + j, bias, words, lane);
    return;
  }
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    if (j % 4 == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) words[h] = mask.word((FIRST + j) / 4, h, lane);
    }
    initial_scores<false>(s[j], FIRST + j, bias, words, lane);
  }
}

// Scores become exp2(unit (s - top)); what came before is rescaled.
template <int COUNT>
__device__ __forceinline__ void soften(Output& output, float (&s)[COUNT][4], float unit, bool first, int lane) {
  float factors[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float top = output.top[h];
#pragma unroll
    for (int j = 0; j < COUNT; ++j) top = fmaxf(top, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    factors[h] = ex2_approx((output.top[h] - top) * unit);
    output.top[h] = top;
    const float shift = top * unit;
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
#pragma unroll
      for (int e = 2 * h; e < 2 * h + 2; ++e) s[j][e] = ex2_approx(__fmaf_rn(s[j][e], unit, -shift));
    }
  }
  if (!first) rescale(output, factors, lane);
}

// All chunks of a tile from FIRST on. `kept` are its accumulators, if it has them.
template <int FIRST, int KEPT_BLOCKS>
__device__ __forceinline__ void attend(Output& output, const Queries& query, unsigned keys, unsigned values, int slot,
                                       bool interior, const TileMask& mask, const float* bias,
                                       const float (&kept)[KEPT_BLOCKS][4], float unit, int lane) {
  if constexpr (FIRST < BLOCKS) {
    constexpr int COUNT = FIRST + CHUNK <= BLOCKS ? CHUNK : BLOCKS - FIRST;
    float s[COUNT][4];
    if constexpr (KEPT) {
      score<FIRST>(s, kept, query, keys, slot, lane);
    } else {
      start<FIRST>(s, interior, mask, bias, lane);
      score<FIRST>(s, s, query, keys, slot, lane);
    }
    soften(output, s, unit, FIRST == 0, lane);
    weigh<FIRST>(output, s, values, slot, lane);
    attend<FIRST + COUNT>(output, query, keys, values, slot, interior, mask, bias, kept, unit, lane);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    tiled_forward(const Element* __restrict__ q, const Element* __restrict__ k, const Element* __restrict__ v,
                  const BiasElement* __restrict__ rpb, Element* __restrict__ out, float* __restrict__ lse, float scale,
                  const __grid_constant__ Params params) {
  extern __shared__ __align__(128) unsigned char shared[];
  float* tables = reinterpret_cast<float*>(shared + STAGES * SPAN);
  Tile* tiles = reinterpret_cast<Tile*>(tables + TABLES);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  unsigned char* stages = shared + STAGES * SPAN + (TABLES * sizeof(float) + TILES * sizeof(Tile) + 127) / 128 * 128 +
                          warp * 2 * STAGE;  // one for the tile at hand, one for the next one's Q
  const Region region(params.sizes, blockIdx.x);
  const ScaleParts parts(scale);

  q = region.base(q, params.q, region.head);
  k = region.base(k, params.k, region.head_kv) + params.k.offset(region.key[0], region.key[1], region.key[2]);
  v = region.base(v, params.v, region.head_kv) + params.v.offset(region.key[0], region.key[1], region.key[2]);
  out = region.base(out, params.out, region.head);
  if (lse != nullptr) lse = region.base(lse, params.lse, region.head);

  const auto follows = [&](int round) {  // whether there is another batch entry
    return LOOPED && region.split + (round + 1) * params.sizes.splits < params.sizes.batch;
  };
  const auto entry = [&](int round) { return static_cast<long long>(round) * params.sizes.splits; };
  const auto load_keys = [&](int round) {
    const unsigned span = shared_address(shared) + (STAGES == 2 ? round % 2 * SPAN : 0);
    load_span<HEAD_DIM>(span, k + entry(round) * params.k.batch, params.k, region);
    load_span<HEAD_DIM_V>(span + SLOTS * K_PITCH, v + entry(round) * params.v.batch, params.v, region);
    cp_async_commit();
  };
  const Share<HEAD_DIM> share_q(params.q, lane);
  const OutputShare share_out(params.out, lane);
  const int lse_row = lane / 4 + lane % 2 * 8;  // of the row whose lse this lane writes, if lane % 4 < 2
  const int lse_offset = static_cast<int>(
      params.lse.offset(row_axis(0, lse_row), row_axis(1, lse_row), row_axis(2, lse_row)));
  const auto load_next = [&](int round, int index, unsigned stage) {  // Q of this tile, if there is one
    if (index < TILES && tiles[index].exists) {
      const Tile& tile = tiles[index];
      const long long at = params.q.offset(tile.query[0], tile.query[1], tile.query[2]);
      load_tile(stage, q + (entry(round) * params.q.batch + at), params.q, share_q, tile, lane);
    }
    cp_async_commit();
  };

  load_keys(0);
  if (threadIdx.x < TILES) tiles[threadIdx.x] = Tile(region, threadIdx.x);
  fill_tables(tables, rpb + static_cast<long long>(region.head) * params.rpb.head, params.rpb, parts.bias);
  __syncthreads();

  float kept[KEPT ? BLOCKS : 1][4];  // the accumulators of this warp's one tile, the same for all batch entries
  if constexpr (KEPT) {
    const Tile& tile = tiles[warp];
    if (tile.exists)
      start<0>(kept, false, TileMask(tile, lane), tables + table_offset(tile, false, lane), lane);
  }

  int parity = 0;
#pragma unroll 1
  for (int round = 0;; ++round) {
    load_next(round, warp, shared_address(stages + parity * STAGE));
    if (STAGES == 2 && follows(round)) {
      load_keys(round + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();  // this round's span is there
    const unsigned keys = shared_address(shared) + (STAGES == 2 ? round % 2 * SPAN : 0);
    const unsigned values = keys + SLOTS * K_PITCH;
#pragma unroll 1
    for (int index = warp; index < TILES; index += THREADS / 32) {
      const Tile& tile = tiles[index];
      unsigned char* stage = stages + parity * STAGE;
      parity ^= 1;
      if (index != warp) cp_async_wait<0>();
      __syncwarp();
      const Queries query(shared_address(stage), parts.query, lane);
      load_next(round, index + THREADS / 32, shared_address(stages + parity * STAGE));
      if (!tile.exists) continue;
      const int slot = tile.slot;
      const unsigned its_keys = keys + slot * K_PITCH, its_values = values + slot * V_PITCH;
      const float* bias = tables + table_offset(tile, tile.interior, lane);
      Output output;
      const auto attend_all = [&](bool interior) {
        TileMask mask;
        if (!KEPT && !interior) mask = TileMask(tile, lane);
        attend<0>(output, query, its_keys, its_values, slot, interior, mask, bias, kept, parts.unit, lane);
      };
      if (KEPT || !UNCLAMPED) {
        attend_all(false);
      } else if (LONG_PRODUCTS) {
        attend_all(tile.interior);
      } else if (tile.interior) {
        attend_all(true);
      } else {
        attend_all(false);
      }
      complete(output);
      const int x0 = tile.query[0], x1 = tile.query[1], x2 = tile.query[2];
      store_output(out + (entry(round) * params.out.batch + params.out.offset(x0, x1, x2)), stage, params.out,
                   share_out, tile, output, lane);
      if (lse != nullptr && lane % 4 < 2 && (tile.whole || tile.stores(lse_row))) {
        const float top = lane % 2 == 0 ? output.top[0] : output.top[1];
        const float sum = lane % 2 == 0 ? output.sum[0] : output.sum[2];
        lse[entry(round) * params.lse.batch + params.lse.offset(x0, x1, x2) + lse_offset] =
            (top * parts.unit + lg2_approx(sum)) * LN_2;
      }
    }
    if (!follows(round)) return;
    __syncthreads();  // this round's span has been read
    if (STAGES == 1) load_keys(round + 1);
  }
}
