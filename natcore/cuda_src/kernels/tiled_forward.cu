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
//     k k k q q q q q q q q k k k          + + + Q Q Q Q + + +     are such that number and slot agree
//     k k k q q q q q q q q k k k          + + + Q Q Q Q + + +     modulo 8, and a slot is an odd
//       ...                                + + + Q Q Q Q + + +     number of 16-byte chunks, so the
//     k k k k k k k k k k k k k k            ...                   gather meets no bank twice.
//
// Bias and mask are the accumulator that S starts from, in units of 1 / scale: for a tile whose windows
// are all unclamped, one table of differences key - query holds both; other tiles clear scores by bit
// masks. Scores stay in registers, CHUNK blocks at a time, with an online softmax where a tile has more.
//
// Shared memory: K and V halo, SLOTS x (K_PITCH + V_PITCH); the two difference tables; and for each warp
// one tile of Q, which later carries the tile of O to 16-byte stores.
#include "common/tile_mask.cuh"

struct Params {
  Sizes sizes;
  Layout q, k, v, rpb, out, lse;
};

// The running softmax of rows g and g + 8 of a tile, g = lane / 4: sums are this lane's share.
struct Softmax {
  float top[2] = {-1e30f, -1e30f};  // finite: rows beyond the map see no key
  float sum[2] = {0.f, 0.f};
};

// Queries of a warp's stage as A operands, multiplied by `factor`.
__device__ __forceinline__ void load_queries(unsigned (&query)[D_STEPS][4], unsigned stage, float factor, int lane) {
#pragma unroll
  for (int c = 0; c < D_STEPS; ++c) {
    const int row = lane % 16, chunk = smaller(2 * c + lane / 16, D_CHUNKS - 1);
    ldmatrix_x4(query[c], stage + row * K_PITCH + Rows<HEAD_DIM>::chunk(row, chunk));
    if (factor != 1.f) {
#pragma unroll
      for (unsigned& pair : query[c]) pair = pack<Element>(factor * low<Element>(pair), factor * high<Element>(pair));
    }
  }
}

// S of COUNT blocks, from block FIRST on.
template <bool INTERIOR, int FIRST, int COUNT>
__device__ __forceinline__ void score(float (&s)[COUNT][4], const unsigned (&query)[D_STEPS][4], unsigned keys,
                                      int slot, const TileMask& mask, const float* bias, int lane) {
  unsigned words[2];
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    if (!INTERIOR && j % 4 == 0) {
#pragma unroll
      for (int h = 0; h < 2; ++h) words[h] = mask.word((FIRST + j) / 4, h, lane);
    }
    initial_scores<INTERIOR>(s[j], FIRST + j, bias, words, lane);
    const unsigned row = keys + key_offset<SLOT_PLANE, SLOT_ROW>((FIRST + j) * 8, lane % 8) * K_PITCH;
#pragma unroll
    for (int c = 0; c < D_STEPS; c += 2) {
      unsigned key[4];
      ldmatrix_x4(key, row + Rows<HEAD_DIM>::chunk(slot + lane % 8, smaller(2 * c + lane / 8, D_CHUNKS - 1)));
#pragma unroll
      for (int i = c; i < c + 2; ++i) {
        if (2 * i + 1 < D_CHUNKS) {
          Mma<Element>::m16n8k16(s[j], query[i][0], query[i][1], query[i][2], query[i][3], key[2 * (i - c)],
                                 key[2 * (i - c) + 1], s[j]);
        } else if (2 * i < D_CHUNKS) {
          Mma<Element>::m16n8k8(s[j], query[i][0], query[i][1], key[2 * (i - c)], s[j]);
        }
      }
    }
  }
}

// Scores become exp2(unit (s - top)); what came before is rescaled.
template <int COUNT>
__device__ __forceinline__ void soften(Softmax& softmax, float (&s)[COUNT][4], float (&out)[V_TILES][4], float unit,
                                       bool first) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float top = softmax.top[h];
#pragma unroll
    for (int j = 0; j < COUNT; ++j) top = fmaxf(top, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    if (!first) {
      const float rescale = ex2_approx((softmax.top[h] - top) * unit);
      softmax.sum[h] *= rescale;
#pragma unroll
      for (int n = 0; n < V_TILES; ++n) out[n][2 * h] *= rescale, out[n][2 * h + 1] *= rescale;
    }
    softmax.top[h] = top;
    const float shift = top * unit;
    float sums[2] = {softmax.sum[h], 0.f};
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float p = ex2_approx(__fmaf_rn(s[j][2 * h + e], unit, -shift));
        s[j][2 * h + e] = p;
        sums[e] += p;
      }
    }
    softmax.sum[h] = sums[0] + sums[1];
  }
}

// O += P V for the keys of CHUNK blocks.
template <int FIRST, int COUNT>
__device__ __forceinline__ void weigh(float (&out)[V_TILES][4], const float (&p)[COUNT][4], unsigned values, int slot, int lane) {
#pragma unroll
  for (int j = 0; j < COUNT; j += 2) {
    const unsigned a0 = pack<Element>(p[j][0], p[j][1]), a1 = pack<Element>(p[j][2], p[j][3]);
    if (j + 1 < COUNT) {
      const int i = j + 1 < COUNT ? j + 1 : j;
      const unsigned a2 = pack<Element>(p[i][0], p[i][1]), a3 = pack<Element>(p[i][2], p[i][3]);
      const unsigned row = values + key_offset<SLOT_PLANE, SLOT_ROW>((FIRST + j) * 8, lane % 16) * V_PITCH;
#pragma unroll
      for (int n = 0; n < V_TILES; n += 2) {
        unsigned r[4];
        ldmatrix_x4_transposed(r, row + Rows<HEAD_DIM_V>::chunk(slot + lane % 8, smaller(n + lane / 16, V_TILES - 1)));
        Mma<Element>::m16n8k16(out[n], a0, a1, a2, a3, r[0], r[1], out[n]);
        if (n + 1 < V_TILES) Mma<Element>::m16n8k16(out[n + 1], a0, a1, a2, a3, r[2], r[3], out[n + 1]);
      }
    } else {
      const unsigned row = values + key_offset<SLOT_PLANE, SLOT_ROW>((FIRST + j) * 8, lane % 8) * V_PITCH;
#pragma unroll
      for (int n = 0; n < V_TILES; n += 4) {
        unsigned r[4];
        ldmatrix_x4_transposed(r, row + Rows<HEAD_DIM_V>::chunk(slot + lane % 8, smaller(n + lane / 8, V_TILES - 1)));
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (n + i < V_TILES) Mma<Element>::m16n8k8(out[n + i], a0, a1, r[i], out[n + i]);
      }
    }
  }
}

// All chunks of a tile from FIRST on.
template <bool INTERIOR, int FIRST>
__device__ __forceinline__ void attend(Softmax& softmax, float (&out)[V_TILES][4], const unsigned (&query)[D_STEPS][4],
                                       unsigned keys, unsigned values, int slot, const TileMask& mask,
                                       const float* bias, float unit, int lane) {
  if constexpr (FIRST < BLOCKS) {
    constexpr int COUNT = FIRST + CHUNK <= BLOCKS ? CHUNK : BLOCKS - FIRST;
    float s[COUNT][4];
    score<INTERIOR, FIRST>(s, query, keys, slot, mask, bias, lane);
    soften(softmax, s, out, unit, FIRST == 0);
    weigh<FIRST>(out, s, values, slot, lane);
    attend<INTERIOR, FIRST + COUNT>(softmax, out, query, keys, values, slot, mask, bias, unit, lane);
  }
}

// Ends the softmax: normalises O into the warp's stage and leaves the row's lse in softmax.sum.
__device__ __forceinline__ void finish(unsigned char* stage, Softmax& softmax, const float (&out)[V_TILES][4],
                                       float unit, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = softmax.sum[h];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const float inverse = rcp_approx(sum);
    softmax.sum[h] = (softmax.top[h] * unit + lg2_approx(sum)) * LN_2;
    unsigned char* row = stage + (lane / 4 + 8 * h) * V_PITCH + lane % 4 * 4;
#pragma unroll
    for (int n = 0; n < V_TILES; ++n)
      *reinterpret_cast<unsigned*>(row + Rows<HEAD_DIM_V>::chunk(lane / 4, n)) =
          pack<Element>(out[n][2 * h] * inverse, out[n][2 * h + 1] * inverse);
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
    return region.split + (round + 1) * params.sizes.splits < params.sizes.batch;
  };
  const auto entry = [&](int round) { return static_cast<long long>(round) * params.sizes.splits; };
  const auto load_keys = [&](int round) {
    const unsigned span = shared_address(shared) + (STAGES == 2 ? round % 2 * SPAN : 0);
    load_span<HEAD_DIM>(span, k + entry(round) * params.k.batch, params.k, region);
    load_span<HEAD_DIM_V>(span + SLOTS * K_PITCH, v + entry(round) * params.v.batch, params.v, region);
    cp_async_commit();
  };
  const auto load_next = [&](int round, int index, unsigned stage) {  // Q of this tile, if there is one
    if (index < TILES && tiles[index].exists) {
      const Tile& tile = tiles[index];
      load_tile(stage, q + (entry(round) * params.q.batch + params.q.offset(tile.query[0], tile.query[1], tile.query[2])),
                params.q, region, tile, lane);
    }
    cp_async_commit();
  };

  load_keys(0);
  if (threadIdx.x < TILES) tiles[threadIdx.x] = Tile(region, threadIdx.x);
  fill_tables(tables, rpb + static_cast<long long>(region.head) * params.rpb.head, params.rpb, parts.bias);
  __syncthreads();

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
    const unsigned keys = shared_address(shared) + (STAGES == 2 ? round % 2 * SPAN : 0), values = keys + SLOTS * K_PITCH;
#pragma unroll 1
    for (int index = warp; index < TILES; index += THREADS / 32) {
      const Tile& tile = tiles[index];
      unsigned char* stage = stages + parity * STAGE;
      parity ^= 1;
      if (index != warp) cp_async_wait<0>();
      __syncwarp();
      unsigned query[D_STEPS][4];
      load_queries(query, shared_address(stage), parts.query, lane);
      load_next(round, index + THREADS / 32, shared_address(stages + parity * STAGE));
      if (!tile.exists) continue;
      const float* bias = tables + table_offset(tile, lane);
      const int slot = tile.slot;
      const unsigned its_keys = keys + slot * K_PITCH, its_values = values + slot * V_PITCH;
      Softmax softmax;
      float o[V_TILES][4] = {};
      if (UNCLAMPED && tile.interior) {
        attend<true, 0>(softmax, o, query, its_keys, its_values, slot, TileMask(), bias, parts.unit, lane);
      } else {
        attend<false, 0>(softmax, o, query, its_keys, its_values, slot, TileMask(region, tile, lane), bias, parts.unit,
                         lane);
      }
      __syncwarp();  // the queries have been read
      finish(stage, softmax, o, parts.unit, lane);
      __syncwarp();
      const int x0 = tile.query[0], x1 = tile.query[1], x2 = tile.query[2];
      store_tile(out + (entry(round) * params.out.batch + params.out.offset(x0, x1, x2)), stage, params.out, region, tile,
                 lane);
      const int row = lane / 4 + lane % 4 * 8;
      if (lse != nullptr && lane % 4 < 2 && (tile.whole || tile.stores(region, row)))
        lse[entry(round) * params.lse.batch +
            params.lse.offset(x0 + row_axis(0, row), x1 + row_axis(1, row), x2 + row_axis(2, row))] =
            lane % 4 == 0 ? softmax.sum[0] : softmax.sum[1];
    }
    if (!follows(round)) return;
    __syncthreads();  // this round's span has been read
    if (STAGES == 1) load_keys(round + 1);
  }
}
