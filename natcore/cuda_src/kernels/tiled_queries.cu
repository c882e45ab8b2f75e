// Neighbourhood attention, backward of queries, on tensor cores: windows of one, two and three axes, 16-bit elements.
//
// A warp owns a tile of 16 queries; its keys and values come through shared memory plane by plane, are gathered by
// ldmatrix 16 at a time, and need not wait for each other, because the LSE is known (common/tiled_boxes.cuh has a
// picture).
//
//   S = Q K^T, dP = dO V^T - delta, P = exp(S - lse), dS = P dP, dQ += dS K
//
// delta = dO . O - d_lse. {log2(e) lse, -delta} are written for tiled_keys.cu, which makes dk and dv. drpb is summed as
// common/tiled_bias.cuh says; each block writes one partial sum, and sum_drpb.cu adds them up.
//
// Shared memory (3 x 7 x 7 windows of head_dim 64, regions of 6 x 1 tiles of 2 x 8): a plane of K and V, 19 x 16 slots
// of 256 bytes, 76 KB; Q and dO of each warp, 4 KB; two tables of differences, 21 KB; sums of dS of each warp, 15 KB;
// regions and tiles, 1 KB.
#include "common/tiled_gradients.cuh"

struct Params {
  Sizes sizes;
  Layout d_out, q, k, v, out, lse, d_lse, rpb, dq, scalars;
  int heads_per_kv;
};

struct Queries {
  const Element *d_out, *q, *k, *v, *out;
  const float *lse, *d_lse;
  Element* dq;
  float2* scalars;
  float* drpb_partials;
  const Params& params;
  unsigned char* shared;
  ScaleParts parts;
  float scale;
  int head, head_kv, warp, lane;
  bool flushed = false;

  struct State {
    Own own;
    Results results;
    uint4 out[2][OUT_CHUNKS];  // 16 of each 64 bytes of O, of both own tokens
  };

  __device__ __forceinline__ int own_at(int own) const { return OWN_AT + (warp * OWN_STAGES + own) * OWN; }

  __device__ __forceinline__ void load_seen(const Region& region, int, int plane, int stage) const {
    const unsigned target = shared_address(shared) + stage * STAGE;
    load_plane(target, region.first_slot(k, params.k, head_kv, plane), params.k,
               region.first_slot(v, params.v, head_kv, plane), params.v, region);
  }
  __device__ __forceinline__ void load_own(const Region& region, const Tile& tile, int own) const {
    const unsigned at = shared_address(shared) + own_at(own);
    ::load_own<HEAD_DIM, D>(at, tile.base(q, params.q, region, head), params.q, tile, lane);
    ::load_own<HEAD_DIM_V, V>(at + 16 * D_PITCH, tile.base(d_out, params.d_out, region, head), params.d_out, tile,
                              lane);
  }
  // Loads what goes through registers.
  __device__ __forceinline__ void announce(State& state, const Region& region, const Tile& tile) const {
    const Element* its = tile.base(out, params.out, region, head);
    const float* its_lse = tile.base(lse, params.lse, region, head);
    const float* its_d_lse = d_lse == nullptr ? nullptr : tile.base(d_lse, params.d_lse, region, head);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = lane / 4 + 8 * h;
      const bool stored = tile.stores(token);
      const Element* row = its + Tile::offset(params.out, token);
#pragma unroll
      for (int i = 0; i < OUT_CHUNKS; ++i) {
        const int chunk = 4 * i + lane % 4;
        state.out[h][i] = uint4{0, 0, 0, 0};
        if (stored && chunk < HEAD_DIM_V / CHUNK_ELEMENTS)
          state.out[h][i] = *reinterpret_cast<const uint4*>(row + chunk * CHUNK_ELEMENTS);
      }
      // Queries that another tile owns weigh nothing.
      state.own.lse[h] = __int_as_float(0x7f800000), state.own.minus_delta[2 * h] = 0.f;
      if (stored) state.own.lse[h] = LOG2_E * its_lse[Tile::offset(params.lse, token)];
      if (stored && d_lse != nullptr) state.own.minus_delta[2 * h] = its_d_lse[Tile::offset(params.d_lse, token)];
    }
  }
  __device__ __forceinline__ void begin(State& state, const Region& region, const Tile& tile, int its_own) const {
    Own& own = state.own;
    float products[2];  // dO . O
    multiply_rows(products, shared + own_at(its_own) + 16 * D_PITCH, state.out, lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      own.minus_delta[2 * h] -= products[h];
      own.minus_delta[2 * h + 1] = own.minus_delta[2 * h];
    }
    // Lane 0 of four writes the scalars of their first token, and lane 1 those of the second.
    const float2 of_first{own.lse[0], own.minus_delta[0]}, of_second{own.lse[1], own.minus_delta[2]};
    const bool second = lane % 2;
    const int token = lane / 4 + (second ? 8 : 0);
    if ((lane % 4 < 2) & tile.stores(token))
      tile.base(scalars, params.scalars, region, head)[Tile::offset(params.scalars, token)] =
          float2{second ? of_second.x : of_first.x, second ? of_second.y : of_first.y};
    const unsigned at = shared_address(shared) + own_at(its_own);
    own.d.read(at, parts.query, lane);
    own.v.read(at + 16 * D_PITCH, 1.f, lane);
    state.results.clear();
  }
  __device__ __forceinline__ void add(State& state, const Region& region, const Tile& tile, int, int plane,
                                      const unsigned char* stage) const {
    const float* table = reinterpret_cast<const float*>(shared + TABLE_AT) +
                         table_offset(tile, PLANES == 1 ? 0 : plane - region.owned[0], lane);
    float4* sums = sums_of(shared, warp) + (PLANES == 1 ? 0 : plane - region.planes.start) * (LINES * (STEPS + 1) * 32);
    if (uniform(tile.plain)) {
      differentiate<true>(state.results, state.own, tile, region, stage, table, sums, parts.unit, lane);
    } else {
      differentiate<false>(state.results, state.own, tile, region, stage, table + TABLE, sums, parts.unit, lane);
    }
  }
  __device__ __forceinline__ void end(const State& state, const Region& region, const Tile& tile) const {
    if (dq != nullptr)
      store_result<HEAD_DIM, D>(tile.base(dq, params.dq, region, head), params.dq, tile, state.results.d, scale, lane);
  }
  __device__ __forceinline__ bool change(const Region& region, const Tile& tile) const {
    const int* kind = kind_of(shared, warp);
    const Kind its(tile, region);
    return BIASED && tile.exists && (kind[0] != its.start[0] || kind[1] != its.start[1] || kind[2] != its.start[2]);
  }
  __device__ __forceinline__ void flush() {
    if (drpb_partials != nullptr)
      add_sums(drpb_partials + static_cast<long long>(blockIdx.x) * ENTRIES, shared, !flushed);
    flushed = true;
  }
  __device__ __forceinline__ void clear(const Region& region, const Tile& tile) const {
    for (int i = lane; i < SUMS / 16; i += 32) sums_of(shared, warp)[i] = float4{0.f, 0.f, 0.f, 0.f};
    const Kind its(tile, region);
#pragma unroll
    for (int a = 0; a < 3; ++a)
      if (tile.exists) kind_of(shared, warp)[a] = its.start[a];
    __syncwarp();
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    tiled_queries(const Element* __restrict__ d_out,    // [batch, x0, x1, x2, heads, HEAD_DIM_V]
                  const Element* __restrict__ q,        // [batch, x0, x1, x2, heads, HEAD_DIM]
                  const Element* __restrict__ k,        // [batch, x0, x1, x2, heads / heads_per_kv, HEAD_DIM]
                  const Element* __restrict__ v,        // [batch, x0, x1, x2, heads / heads_per_kv, HEAD_DIM_V]
                  const Element* __restrict__ out,      // [batch, x0, x1, x2, heads, HEAD_DIM_V]
                  const float* __restrict__ lse,        // [batch, x0, x1, x2, heads]
                  const float* __restrict__ d_lse,      // [batch, x0, x1, x2, heads], or null: zeros
                  const BiasElement* __restrict__ rpb,  // [heads, 2 k0 - 1, 2 k1 - 1, 2 k2 - 1]
                  Element* __restrict__ dq,             // [batch, x0, x1, x2, heads, HEAD_DIM], or null
                  float2* __restrict__ scalars,         // [batch, heads, x0, x1, x2]: {log2(e) lse, -delta}
                  float* __restrict__ drpb_partials,    // [slices, heads, 2 k0 - 1, 2 k1 - 1, 2 k2 - 1], or null
                  float scale, const __grid_constant__ Params params) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int head = blockIdx.x % params.sizes.heads, slice = blockIdx.x / params.sizes.heads;
  clear_shared(shared);
  __syncthreads();
  Queries pass{d_out, q, k, v, out, lse, d_lse, dq, scalars, drpb_partials, params, shared, ScaleParts(scale), scale,
               head, head / params.heads_per_kv, warp, lane};
  fill_tables(reinterpret_cast<float*>(shared + TABLE_AT), rpb + static_cast<long long>(head) * params.rpb.head,
              params.rpb, pass.parts.bias);
  work(pass, params.sizes, shared, slice, warp);
  if (BIASED) {
    __syncthreads();
    pass.flush();
  }
}
