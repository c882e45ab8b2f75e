// Neighbourhood attention, backward of keys, on tensor cores: windows of one, two and three axes, 16-bit elements.
//
// The mirror image of tiled_queries.cu: a warp owns a tile of 16 keys, and what comes by plane by plane are the queries
// that see them, with output gradients and the scalars that tiled_queries.cu wrote. Under grouped heads those of all
// query heads of the key's head come, one head after the other.
//
//   S = K Q^T, dP = V dO^T - delta, P = exp(S - lse), dS = P dP, dV += P dO, dK += dS Q     (S, P and dS transposed)
//
// Keys near a border are seen by more queries than others, because windows are clamped there: boxes are of any size.
//
// Shared memory (3 x 7 x 7 windows of head_dim 64, regions of 4 x 1 tiles of 2 x 8, two blocks an SM): a plane of Q, dO
// and scalars, 15 x 16 slots of 264 bytes, 62 KB; K and V of each warp, 4 KB; two tables of differences for each query
// head, 27 KB; regions and tiles, 1 KB.
#include "common/tiled_gradients.cuh"

struct Params {
  Sizes sizes;
  Layout d_out, q, k, v, rpb, dk, dv, scalars;
};

struct Keys {
  const Element *d_out, *q, *k, *v;
  const float2* scalars;
  Element *dk, *dv;
  const Params& params;
  unsigned char* shared;
  float scale;
  int head, warp, lane;

  struct State {
    Own own;
    Results results;
  };

  // Found anew: not worth registers from region to region.
  __device__ __forceinline__ ScaleParts parts() const {
    return ScaleParts(__int_as_float(anew(__float_as_int(scale))));
  }
  __device__ __forceinline__ unsigned own_at(int own) const {
    return shared_address(shared) + OWN_AT + (anew(warp) * OWN_STAGES + own) * OWN;
  }

  __device__ __forceinline__ void load_seen(const Region& region, int number, int plane, int stage) const {
    const int its_head = head * SEEN_HEADS + number;
    const unsigned target = shared_address(shared) + stage * STAGE;
    load_plane(target, region.first_slot(q, params.q, its_head, plane), params.q,
               region.first_slot(d_out, params.d_out, its_head, plane), params.d_out, region);
    load_scalars(target + SCALARS_AT, region.first_slot(scalars, params.scalars, its_head, plane), params.scalars,
                 region);
  }
  __device__ __forceinline__ void load_own(const Region& region, const Tile& tile, int own) const {
    ::load_own<HEAD_DIM, D>(own_at(own), tile.base(k, params.k, region, head), params.k, tile, lane);
    ::load_own<HEAD_DIM_V, V>(own_at(own) + 16 * D_PITCH, tile.base(v, params.v, region, head), params.v, tile, lane);
  }
  __device__ __forceinline__ void announce(State&, const Region&, const Tile&) const {}
  __device__ __forceinline__ void begin(State& state, const Region&, const Tile&, int own) const {
    state.own.d.read(own_at(own), parts().query, anew_lane(lane));
    state.own.v.read(own_at(own) + 16 * D_PITCH, 1.f, anew_lane(lane));
    state.results.clear();
  }
  __device__ __forceinline__ void add(State& state, const Region& region, const Tile& tile, int number, int plane,
                                      const unsigned char* stage) const {
    const float* table = reinterpret_cast<const float*>(shared + TABLE_AT) + (BIASED ? number * TABLES * TABLE : 0) +
                         table_offset(tile, PLANES == 1 ? 0 : plane - region.owned[0], lane);
    const float unit = parts().unit;
    if (uniform(tile.plain)) {
      differentiate<true>(state.results, state.own, tile, region, stage, table, nullptr, unit, anew_lane(lane));
    } else {
      differentiate<false>(state.results, state.own, tile, region, stage, table + TABLE, nullptr, unit,
                           anew_lane(lane));
    }
  }
  __device__ __forceinline__ void end(const State& state, const Region& region, const Tile& tile) const {
    if (dk != nullptr)
      store_result<HEAD_DIM, D>(tile.base(dk, params.dk, region, head), params.dk, tile, state.results.d, scale,
                                anew_lane(lane));
    if (dv != nullptr)
      store_result<HEAD_DIM_V, V>(tile.base(dv, params.dv, region, head), params.dv, tile, state.results.v, 1.f,
                                  anew_lane(lane));
  }
  __device__ __forceinline__ bool change(const Region&, const Tile&) const { return false; }
  __device__ __forceinline__ void flush() const {}
  __device__ __forceinline__ void clear(const Region&, const Tile&) const {}
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    tiled_keys(const Element* __restrict__ d_out,    // [batch, x0, x1, x2, heads * HEADS_PER_KV, HEAD_DIM_V]
               const Element* __restrict__ q,        // [batch, x0, x1, x2, heads * HEADS_PER_KV, HEAD_DIM]
               const Element* __restrict__ k,        // [batch, x0, x1, x2, heads, HEAD_DIM]
               const Element* __restrict__ v,        // [batch, x0, x1, x2, heads, HEAD_DIM_V]
               const float2* __restrict__ scalars,   // [batch, heads * HEADS_PER_KV, x0, x1, x2]: {log2(e) lse, -delta}
               const BiasElement* __restrict__ rpb,  // [heads * HEADS_PER_KV, 2 k0 - 1, 2 k1 - 1, 2 k2 - 1]
               Element* __restrict__ dk,             // [batch, x0, x1, x2, heads, HEAD_DIM], or null
               Element* __restrict__ dv,             // [batch, x0, x1, x2, heads, HEAD_DIM_V], or null
               float scale, const __grid_constant__ Params params) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int head = blockIdx.x % params.sizes.heads, slice = blockIdx.x / params.sizes.heads;
  clear_shared(shared);
  __syncthreads();
  Keys pass{d_out, q, k, v, scalars, dk, dv, params, shared, scale, head, warp, lane};
  for (int number = 0; number < (BIASED ? SEEN_HEADS : 1); ++number)
    fill_tables(reinterpret_cast<float*>(shared + TABLE_AT) + number * TABLES * TABLE,
                rpb + static_cast<long long>(head * SEEN_HEADS + number) * params.rpb.head, params.rpb,
                ScaleParts(scale).bias);
  work(pass, params.sizes, shared, slice, warp);
}
