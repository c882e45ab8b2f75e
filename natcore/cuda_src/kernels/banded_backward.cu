// Neighbourhood attention, backward, on tensor cores: small windows, 16-bit elements, no atomics on results.
//
// A block walks down the map, region by region, of one head. In shared memory lie the keys and values that the
// region's queries see, and the queries and output gradients that see its keys; each is brought once. Tiles of
// queries make dq and drpb (band_queries.cuh); tiles of keys make dk and dv, from scores computed again
// (band_keys.cuh): float32 sums of dk and dv in shared memory would cost more than two more products.
//
//   step i      QUERY_WARPS   their tiles of queries, always the same ones, so that sums of drpb have an order
//               all warps     start the copies of step i + 1's new rows (band_loads.cuh) and make the tables of its
//                             bands (band_tables.cuh); then lse and delta of the new rows' queries, whoever is free
//               all warps     tiles of keys, to whoever is free: near borders they differ in length
//
// Two barriers of shared memory separate steps: a warp may work on queries of step i + 1, if that is `loaded`, while
// others work on keys of step i, but step i + 2 takes the place of step i only when that is `done`.
//
// The bias is the accumulator that S starts from; the same table holds the mask (band_bias.cuh). A register
// of dS holds the same difference key - query for as long as a warp's bands look alike: drpb is summed in
// registers, then in a table for each warp, then over blocks by banded_backward_bias, all in a fixed order.
//
// Shared memory: rings of rows of K, V, Q, dO, a row an odd number of 16-byte chunks after the one before it;
// {lse, d_lse - delta} of each query; for two steps, the tables of bands and columns; the bias table; a stage for
// each warp, by which results reach 16-byte stores; a drpb table for each warp of queries; the steps.
#include "common/band_keys.cuh"
#include "common/band_loads.cuh"
#include "common/band_queries.cuh"
#include "ptx/mbarrier.cuh"

// The next `count` of what warps share out among themselves.
__device__ __forceinline__ int claim(int& claimed, int count) {
  int first = 0;
  if (lane_here() == 0) first = atomicAdd(&claimed, count);
  return __shfl_sync(0xffffffffu, first, 0);
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
  const float unit = unit_of(scale);
  const Scales scales{unit * LOG2_E, scale};
  const Pointers from{d_out, q, k, v, out, lse, d_lse};

  fill_table(reinterpret_cast<float*>(shared + BIAS_AT),
             rpb + static_cast<long long>(blockIdx.x % sizes.heads) * params.rpb.head, params.rpb, unit);
  for (int i = threadIdx.x; i < QUERY_WARPS * ENTRIES; i += THREADS)
    reinterpret_cast<float*>(shared + SUMS_AT)[i] = 0.f;
  clear_padding<HEAD_DIM, D_TOKEN, K_ROW, KEY_COLUMNS>(shared + K_AT, KEY_ROWS);
  clear_padding<HEAD_DIM_V, V_TOKEN, V_ROW, KEY_COLUMNS>(shared + V_AT, KEY_ROWS);
  clear_padding<HEAD_DIM, D_TOKEN, Q_ROW, QUERY_COLUMNS>(shared + Q_AT, QUERY_ROWS);
  clear_padding<HEAD_DIM_V, V_TOKEN, G_ROW, QUERY_COLUMNS>(shared + G_AT, QUERY_ROWS);

  const auto step_at = [](int at) -> Step& { return *reinterpret_cast<Step*>(shared + STEPS_AT + at * STEP_BYTES); };
  const unsigned loaded_barrier = shared_address(shared + LOADED_AT), done_barrier = shared_address(shared + DONE_AT);
  if (threadIdx.x == 0) {
    mbarrier_init(loaded_barrier, THREADS + WARPS);
    mbarrier_init(done_barrier, WARPS);
    const long long items = static_cast<long long>(sizes.batch) * DILATION_0 * DILATION_1 * DILATION_2 *
                            sizes.regions[0] * sizes.regions[1] * sizes.regions[2];
    const int slice = blockIdx.x / sizes.heads;
    step_at(0).end = static_cast<int>(items * (slice + 1) / sizes.slices);
    plan_step(step_at(0), step_at(0), params, static_cast<int>(items * slice / sizes.slices));
    plan_step(step_at(1), step_at(0), params);
  }
  __syncthreads();

  BiasSums sums;
  // Where a warp is, 2 * step, plus 1 once the step's loads have started, lies in shared memory and is read anew: the
  // tiles want the registers.
  const auto place = []() -> volatile unsigned& {
    return reinterpret_cast<volatile unsigned*>(shared + PLACES_AT)[warp_here()];
  };
  const auto ready = [&] { return place() % 2 == 1; };
  const auto step_now = [&](int further) -> Step& { return step_at((place() / 2 + further) % 3); };
  const auto tables_now = [&](int further) -> Tables& {
    return reinterpret_cast<Tables*>(shared + TABLES_AT)[(place() / 2 + further) % 2];
  };
  // Whether the next step's rows are brought in this one.
  const auto ahead = [&] { return step_now(1).exists() && step_now(1).loaded; };
  place() = 0;
#pragma unroll 1
  while (step_now(0).exists()) {
    if (ready()) {
      mbarrier_wait(loaded_barrier, place() / 2 % 2);
      if (warp_here() < QUERY_WARPS)  // always the same tiles: sums of drpb have an order
#pragma unroll 1
        for (int tile = warp_here(); tile < BANDS * TILES; tile += QUERY_WARPS)
          query_tile(step_now(0), tables_now(0), tile, scales, shared, sums, dq, params.dq);
    }
    mbarrier_wait(done_barrier, place() / 2 % 2 ^ 1);  // from here on, nobody needs what only the step before had
    if (!ready() || ahead()) {
      const int further = ready() ? 1 : 0;
      Step& coming = step_now(further);
      start_loads(coming, shared, from, params);
      cp_async_arrive(loaded_barrier);
      fill_tables(tables_now(further), coming);
      while (fill_scalars(coming, claim(coming.rows_claimed, ROWS_AT_ONCE), shared, from, params)) {}
      __syncwarp();
      if (lane_here() == 0) mbarrier_arrive(loaded_barrier);
    }
    if (!ready()) {
      __syncwarp();
      place() = place() / 2 * 2 + 1;
      __syncwarp();
      continue;
    }
    if (warp_here() == 0 && lane_here() == 0) plan_step(step_now(2), step_now(1), params);
    __syncwarp();
#pragma unroll 1
    while (true) {  // keys go to whoever is free: near borders their tiles are of different lengths
      const int tile = claim(step_now(0).keys_claimed, 1);
      if (tile >= BANDS * TILES) break;
      key_tile(step_now(0), tables_now(0), tile, scales, shared, dk, dv, params.dk, params.dv);
    }
    __syncwarp();
    const unsigned following = place() / 2 * 2 + 2 + ahead();
    if (lane_here() == 0) mbarrier_arrive(done_barrier);
    __syncwarp();
    place() = following;
    __syncwarp();
  }

  if (drpb_partials == nullptr) return;
  if (warp_here() < QUERY_WARPS) sums.flush(sums_of(shared));
  __syncthreads();
  float* partials = drpb_partials + static_cast<long long>(block_here()) * ENTRIES;  // slice * heads + head
  for (int i = threadIdx.x; i < ENTRIES; i += THREADS) {
    float sum = 0.f;
    for (int w = 0; w < QUERY_WARPS; ++w) sum += reinterpret_cast<const float*>(shared + SUMS_AT)[w * ENTRIES + i];
    partials[i] = sum;
  }
}
