// Neighbourhood attention, backward, on tensor cores: small windows, 16-bit elements, no atomics on results.
//
// A block walks down the map, region by region, of one head. In shared memory lie the keys and values that the
// region's queries see, and the queries and output gradients that see its keys; each is brought once. Tiles of
// queries make dq and drpb (band_queries.cuh); tiles of keys make dk and dv, from scores computed again
// (band_keys.cuh): float32 sums of dk and dv in shared memory would cost more than two more products.
//
//   step i      all warps     start the copies of step i + 1's new rows (band_loads.cuh)
//               QUERY_WARPS   their tiles of queries, always the same ones, so that sums of drpb have an order
//               last quarter  lse and delta of the new rows' queries
//               all warps     tiles of keys, whoever is free: near borders they differ in length
//
// The bias is the accumulator that S starts from; the same table holds the mask (band_bias.cuh). A register
// of dS holds the same difference key - query for as long as a warp's bands look alike: drpb is summed in
// registers, then in a table for each warp, then over blocks by banded_backward_bias, all in a fixed order.
//
// Shared memory: rings of rows of K, V, Q, dO, a row an odd number of 16-byte chunks after the one before it;
// {lse, d_lse - delta} of each query; the bias table and each query column's place in it, for two steps; a
// stage for each warp, by which results reach 16-byte stores; a drpb table for each warp of queries; the steps.
#include "common/band_keys.cuh"
#include "common/band_loads.cuh"
#include "common/band_queries.cuh"

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
  const Pointers from{d_out, q, k, v, out, lse, d_lse};

  fill_table(reinterpret_cast<float*>(shared + TABLE_AT), rpb + static_cast<long long>(head) * params.rpb.head,
             params.rpb, unit);
  for (int i = threadIdx.x; i < QUERY_WARPS * ENTRIES; i += THREADS)
    reinterpret_cast<float*>(shared + SUMS_AT)[i] = 0.f;
  clear_padding<HEAD_DIM, D_TOKEN, K_ROW, KEY_COLUMNS>(shared + K_AT, KEY_ROWS);
  clear_padding<HEAD_DIM_V, V_TOKEN, V_ROW, KEY_COLUMNS>(shared + V_AT, KEY_ROWS);
  clear_padding<HEAD_DIM, D_TOKEN, Q_ROW, QUERY_COLUMNS>(shared + Q_AT, QUERY_ROWS);
  clear_padding<HEAD_DIM_V, V_TOKEN, G_ROW, QUERY_COLUMNS>(shared + G_AT, QUERY_ROWS);

  const long long items = static_cast<long long>(sizes.batch) * DILATION_0 * DILATION_1 * DILATION_2 *
                          sizes.regions[0] * sizes.regions[1] * sizes.regions[2];
  const int begin = static_cast<int>(items * slice / sizes.slices);
  const int end = static_cast<int>(items * (slice + 1) / sizes.slices);
  const auto step_at = [](int i) -> Step& { return *reinterpret_cast<Step*>(shared + STEPS_AT + i * STEP_BYTES); };
  if (threadIdx.x == 0) {
    plan_step(step_at(0), step_at(0), sizes, begin, end);
    plan_step(step_at(1), step_at(0), sizes, -1, end);
  }

  BiasSums sums;
  float* sums_table = reinterpret_cast<float*>(shared + SUMS_AT) + warp * ENTRIES;
  int at = 0;
#pragma unroll 1
  for (int parity = 0;; parity ^= 1) {
    __syncthreads();
    const Step& now = step_at(at);
    if (now.item >= end) break;
    if (!now.loaded) {
      start_loads(now, shared, parity, from, params, head, warp, lane);
      finish_loads(now, shared, from, params, head, warp, lane);
      cp_async_wait_all();
      __syncthreads();
    }
    const Step& next = step_at(at == 2 ? 0 : at + 1);
    const bool ahead = next.item < end && next.loaded;
    if (ahead) start_loads(next, shared, parity ^ 1, from, params, head, warp, lane);
    if (threadIdx.x == THREADS - 1) plan_step(step_at(at == 0 ? 2 : at - 1), next, sizes, -1, end);
    __syncwarp();

    const Region& region = now.region;
    const int* columns = reinterpret_cast<const int*>(shared + COLUMNS_AT) + parity * QUERY_COLUMNS;
    if (warp < QUERY_WARPS) {  // always the same tiles: sums of drpb have an order
      for (int i = warp; i < BANDS * TILES; i += QUERY_WARPS) {
        const Place place(region, i);
        if (place.exists)
          query_tile(now, place, scales, shared, columns, sums, sums_table,
                     dq == nullptr ? nullptr : region.base(dq, params.dq, head), params.dq, lane);
      }
    }
    if (ahead) finish_loads(next, shared, from, params, head, warp, lane);
    // Keys go to whoever is free: near borders their tiles are of different lengths.
    while (true) {
      int i = 0;
      if (lane == 0) i = atomicAdd(&step_at(at).claimed, 1);
      i = __shfl_sync(0xffffffffu, i, 0);
      if (i >= BANDS * TILES) break;
      const Place place(region, i);
      if (place.exists)
        key_tile(now, place, scales, shared, columns, dk == nullptr ? nullptr : region.base(dk, params.dk, head),
                 dv == nullptr ? nullptr : region.base(dv, params.dv, head), params.dk, params.dv, lane);
    }
    cp_async_wait_all();
    at = at == 2 ? 0 : at + 1;
  }

  if (drpb_partials == nullptr) return;
  if (warp < QUERY_WARPS) sums.flush(sums_table, lane);
  __syncthreads();
  for (int i = threadIdx.x; i < ENTRIES; i += THREADS) {
    float sum = 0.f;
    for (int w = 0; w < QUERY_WARPS; ++w) sum += reinterpret_cast<const float*>(shared + SUMS_AT)[w * ENTRIES + i];
    drpb_partials[(static_cast<long long>(slice) * sizes.heads + head) * ENTRIES + i] = sum;
  }
}
