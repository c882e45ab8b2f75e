// What moves into shared memory: the plan of a step, its rows, and the scalars of its queries.
#pragma once

#include "common/band_bias.cuh"

// The step after `now`, which may be before the first: its item, its region and where its rows go.
__device__ __forceinline__ void plan_step(Step& next, const Step& now, const Sizes& sizes, int first, int end) {
  int item = first < 0 ? now.item + 1 : first;
  if (first < 0 && now.item >= end) item = end;
  next.item = item;
  next.loaded = false;
  next.claimed = 0;
  if (item >= end) return;
  next.region = Region(sizes, item);
  if (DILATION_0 * DILATION_1 * DILATION_2 > 1) {
    while (!next.region.exists() && ++item < end) next.region = Region(sizes, item);
    next.item = item;
  }
  const Interval keys = next.region.key_rows, queries = next.region.query_rows;
  if (first >= 0) {
    next.keys = {keys.start, keys.end, 0}, next.queries = {queries.start, queries.end, 0};
    next.new_keys = keys, next.new_queries = queries;
    return;
  }
  // Successive regions of one column of regions, or not: then first[1] starts again.
  const bool together = item == now.item + 1 && next.region.first[1] > 0;
  next.keys = now.keys.followed_by(keys, together), next.queries = now.queries.followed_by(queries, together);
  next.new_keys = together ? Interval{now.keys.end, keys.end} : keys;
  next.new_queries = together ? Interval{now.queries.end, queries.end} : queries;
  next.loaded = now.keys.holds(keys, together) && now.queries.holds(queries, together);
}

// Rows [rows) of all planes, of D elements a token, by `warps` warps; columns outside the map become zeros.
template <int D, int TOKEN, int ROW, int COLUMNS, int RING>
__device__ __forceinline__ void load_rows(unsigned shared, const Element* base, const Layout& s, const Region& region,
                                          Interval planes, Interval rows, const Ring<RING>& ring, int pad, int warp,
                                          int warps, int lane) {
  constexpr int CHUNKS = D / 8, COPIES = (COLUMNS * CHUNKS + 31) / 32;
  const int height = rows.end - rows.start, count = (planes.end - planes.start) * height;
  long long offset[COPIES];  // of this lane's chunks within a row
  unsigned target[COPIES];
  bool inside[COPIES];
#pragma unroll
  for (int i = 0; i < COPIES; ++i) {
    const int column = (32 * i + lane) / CHUNKS, chunk = (32 * i + lane) % CHUNKS, x = region.first[2] - pad + column;
    inside[i] = 0 <= x && x < region.length[2];
    offset[i] = (inside[i] ? static_cast<long long>(x) * s.step[2] : 0) + chunk * 8;
    target[i] = shared + column * TOKEN + chunk * 16;
  }
#pragma unroll 1
  for (int i = warp; i < count; i += warps) {
    const int plane = KERNEL_0 == 1 && REGION_0 == 1 ? 0 : i / height, row = rows.start + i - plane * height;
    const Element* source = shifted(base, s, planes.start + plane, row, 0);
    const int at = (plane * RING + ring.of(row)) * ROW;
#pragma unroll
    for (int c = 0; c < COPIES; ++c)
      if (c + 1 < COPIES || 32 * c + lane < COLUMNS * CHUNKS) cp_async_16(target[c] + at, source + offset[c], inside[c]);
  }
}

// Rows of D elements end in the middle of an mma's k16 or m16: the other half is zeros, written once.
template <int D, int TOKEN, int ROW, int COLUMNS>
__device__ __forceinline__ void clear_padding(unsigned char* shared, int rows) {
  if (D % 16 == 0) return;
  for (int i = threadIdx.x; i < rows * COLUMNS; i += THREADS)
    *reinterpret_cast<uint4*>(shared + i / COLUMNS * ROW + i % COLUMNS * TOKEN + D * 2) = uint4{0, 0, 0, 0};
}

struct Params {
  Sizes sizes;
  Layout d_out, q, k, v, out, lse, d_lse, rpb, dq, dk, dv;
};

struct Pointers {
  const Element *d_out, *q, *k, *v, *out;
  const float *lse, *d_lse;
};

// {lse in units of log 2, d_lse - delta} of the new queries, whose output gradients this warp has copied.
__device__ __forceinline__ void fill_scalars(const Step& step, unsigned char* shared, const Pointers& from,
                                             const Params& params, int head, int warp, int warps, int lane) {
  const Region& region = step.region;
  const Element* out = region.base(from.out, params.out, head);
  const float* lse = region.base(from.lse, params.lse, head);
  const float* d_lse = from.d_lse == nullptr ? nullptr : region.base(from.d_lse, params.d_lse, head);
  constexpr int CHUNKS = HEAD_DIM_V / 8;
  const int height = step.new_queries.end - step.new_queries.start;
  const int count = (region.query_planes.end - region.query_planes.start) * height;
#pragma unroll 1
  for (int i = warp; i < count; i += warps) {
    const int plane = KERNEL_0 == 1 && REGION_0 == 1 ? 0 : i / height;
    const int x0 = region.query_planes.start + plane, x1 = step.new_queries.start + i - plane * height;
    const int at = plane * QUERY_RING + step.queries.of(x1);
#pragma unroll 1
    for (int column = lane; column < QUERY_COLUMNS; column += 32) {
      const int x2 = region.first[2] - QUERY_PAD + column;
      float2 pair{positive_infinity(), 0.f};
      if (0 <= x2 && x2 < region.length[2]) {
        const uint4* values = reinterpret_cast<const uint4*>(shifted(out, params.out, x0, x1, x2));
        const unsigned char* gradients = shared + G_AT + at * G_ROW + column * V_TOKEN;
        pair.x = LOG2_E * *shifted(lse, params.lse, x0, x1, x2);
        if (d_lse != nullptr) pair.y = *shifted(d_lse, params.d_lse, x0, x1, x2);
#pragma unroll 4
        for (int c = 0; c < CHUNKS; ++c) {
          int chunk = c + (V_TOKEN == 64 ? lane / 2 % 4 : 0);  // so that lanes meet different banks
          if (V_TOKEN == 64) chunk %= CHUNKS;
          const uint4 a = values[chunk], b = *reinterpret_cast<const uint4*>(gradients + chunk * 16);
          const unsigned x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            pair.y = fmaf(-low<Element>(x[j]), low<Element>(y[j]), pair.y);
            pair.y = fmaf(-high<Element>(x[j]), high<Element>(y[j]), pair.y);
          }
        }
      }
      reinterpret_cast<float2*>(shared + SCALARS_AT)[at * QUERY_COLUMNS + column] = pair;
    }
  }
}

// Starts the copies of a step's new rows. Each quarter of the warps, LOADERS of them, has one tensor; the last
// has d_out, and later makes the scalars of its rows.
constexpr int WARPS = THREADS / 32, LOADERS = WARPS / 4;
static_assert(WARPS % 4 == 0, "each tensor has as many warps");

__device__ __forceinline__ void start_loads(const Step& step, unsigned char* shared, int parity, const Pointers& from,
                                            const Params& params, int head, int warp, int lane) {
  const Region& region = step.region;
  const unsigned base = shared_address(shared);
  const int tensor = warp / LOADERS, first = warp % LOADERS;
  if (tensor == 0) {
    load_rows<HEAD_DIM, D_TOKEN, K_ROW, KEY_COLUMNS>(base + K_AT, region.base(from.k, params.k, head), params.k, region,
                                                     region.key_planes, step.new_keys, step.keys, KEY_PAD, first,
                                                     LOADERS, lane);
    int* columns = reinterpret_cast<int*>(shared + COLUMNS_AT) + parity * QUERY_COLUMNS;
    for (int column = warp * 32 + lane; column < QUERY_COLUMNS; column += LOADERS * 32)
      columns[column] =
          variant_of(region.first[2] - QUERY_PAD + column, region.length[2]) + QUERY_PAD - column - LEAST_DIFFERENCE;
  } else if (tensor == 1) {
    load_rows<HEAD_DIM_V, V_TOKEN, V_ROW, KEY_COLUMNS>(base + V_AT, region.base(from.v, params.v, head), params.v,
                                                       region, region.key_planes, step.new_keys, step.keys, KEY_PAD,
                                                       first, LOADERS, lane);
  } else if (tensor == 2) {
    load_rows<HEAD_DIM, D_TOKEN, Q_ROW, QUERY_COLUMNS>(base + Q_AT, region.base(from.q, params.q, head), params.q,
                                                       region, region.query_planes, step.new_queries, step.queries,
                                                       QUERY_PAD, first, LOADERS, lane);
  } else {
    load_rows<HEAD_DIM_V, V_TOKEN, G_ROW, QUERY_COLUMNS>(
        base + G_AT, region.base(from.d_out, params.d_out, head), params.d_out, region, region.query_planes,
        step.new_queries, step.queries, QUERY_PAD, first, LOADERS, lane);
  }
}

// Ends them, for this warp.
__device__ __forceinline__ void finish_loads(const Step& step, unsigned char* shared, const Pointers& from,
                                             const Params& params, int head, int warp, int lane) {
  if (warp / LOADERS < 3) return;
  cp_async_wait_all();
  __syncwarp();
  fill_scalars(step, shared, from, params, head, warp % LOADERS, LOADERS, lane);
}
