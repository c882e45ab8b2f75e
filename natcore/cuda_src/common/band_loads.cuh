// What moves into shared memory: the plan of a step, its rows, and the scalars of its queries.
#pragma once

#include "common/band_tables.cuh"

constexpr int WARPS = THREADS / 32;

struct Params {
  Sizes sizes;
  Layout d_out, q, k, v, out, lse, d_lse, rpb, dq, dk, dv;
};

struct Pointers {
  const Element *d_out, *q, *k, *v, *out;
  const float *lse, *d_lse;
};

// The step after `now`; or the first one, of item `first`, in `now` itself.
__device__ __forceinline__ void plan_step(Step& next, const Step& now, const Params& params, int first = -1) {
  int item = first < 0 ? smaller(now.item + 1, now.end) : first;
  next.item = item;
  next.end = now.end;
  next.loaded = false;
  next.keys_claimed = next.rows_claimed = 0;
  if (!next.exists()) return;
  Region region(params.sizes, item);
  if (DILATION_0 * DILATION_1 * DILATION_2 > 1) {
    while (!region.exists() && ++item < next.end) region = Region(params.sizes, item);
    next.item = item;
  }
  const int head = block_here() % params.sizes.heads;
  next.region = region;
  next.width = region.length[2] - region.first[2];
  next.d_out = region.origin(params.d_out, head), next.q = region.origin(params.q, head);
  next.k = region.origin(params.k, head), next.v = region.origin(params.v, head);
  next.out = region.origin(params.out, head), next.lse = region.origin(params.lse, head);
  next.d_lse = region.origin(params.d_lse, head);
  next.dq = region.offset(params.dq, head), next.dk = region.offset(params.dk, head);
  next.dv = region.offset(params.dv, head);
  const Interval keys = region.key_rows, queries = region.query_rows;
  if (first >= 0) {
    next.keys = {keys.start, keys.end, 0}, next.queries = {queries.start, queries.end, 0};
    next.new_keys = keys, next.new_queries = queries;
    return;
  }
  // Successive regions of one column of regions, or not: then first[1] starts again.
  const bool together = item == now.item + 1 && region.first[1] > 0;
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
  constexpr unsigned CHUNKS = D / 8, COPIES = (COLUMNS * CHUNKS + 31) / 32;
  const Element* source[COPIES];  // of this lane's chunks within a row
  unsigned target[COPIES];
  bool inside[COPIES];
  const int origin = region.first[2] - pad, length = region.length[2];
#pragma unroll
  for (unsigned i = 0; i < COPIES; ++i) {
    const unsigned chunk = 32 * i + static_cast<unsigned>(lane);
    const int x = origin + static_cast<int>(chunk / CHUNKS);
    inside[i] = 0 <= x && x < length;
    source[i] = base + (static_cast<long long>(inside[i] ? x : 0) * s.step[2] + chunk % CHUNKS * 8);
    target[i] = shared + chunk / CHUNKS * TOKEN + chunk % CHUNKS * 16;
  }
  const int first = rows.start + warp, end = rows.end;
  const int count = planes.end - planes.start, first_slot = ring.of(first);
  const long long step = static_cast<long long>(s.step[1]) * warps;
#pragma unroll 1
  for (int plane = 0; plane < count; ++plane) {
    long long offset = distance(s, planes.start + plane, first, 0);
    int slot = first_slot;
#pragma unroll 1
    for (int row = first; row < end; row += warps) {
      const int at = (plane * RING + slot) * ROW;
#pragma unroll
      for (unsigned c = 0; c < COPIES; ++c)
        if (c + 1 < COPIES || 32 * c + lane < COLUMNS * CHUNKS)
          cp_async_16(target[c] + at, source[c] + offset, inside[c]);
      offset += step;
      slot += warps;
      while (slot >= RING) slot -= RING;
    }
  }
}

// Rows of D elements end in the middle of an mma's k16 or m16: the other half is zeros, written once.
template <int D, int TOKEN, int ROW, int COLUMNS>
__device__ __forceinline__ void clear_padding(unsigned char* shared, int rows) {
  if (D % 16 == 0) return;
  for (int i = threadIdx.x; i < rows * COLUMNS; i += THREADS)
    *reinterpret_cast<uint4*>(shared + i / COLUMNS * ROW + i % COLUMNS * TOKEN + D * 2) = uint4{0, 0, 0, 0};
}

// Rows of scalars that a warp makes at once: some, where rows are short.
constexpr int ROWS_AT_ONCE = QUERY_COLUMNS <= 8 && HEAD_DIM_V <= 32 ? 4 : 1;

// `columns` columns further on.
template <typename T>
__device__ __forceinline__ const T* further(const T* row, const Layout& s, int columns) {
  const long long bytes = static_cast<long long>(s.step[2]) * static_cast<int>(columns * sizeof(T));
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(row) + bytes);
}

// {lse in units of log 2, d_lse - delta} of the new queries, ROWS_AT_ONCE rows at a time from row `begin` of their list
// on; false where the list has ended.
//
// delta = sum over elements of dO * O. Of 8 tokens at once, as the diagonal of dO O^T: lane l brings the same chunks
// of 8 elements of token l / 4 of both, which are two steps of an mma in whatever order. The rows of A are the tokens
// twice, the second time with the other half of each chunk, so that no register need be cleared.
__device__ __forceinline__ bool fill_scalars(const Step& step, int begin, unsigned char* shared, const Pointers& from,
                                             const Params& params) {
  const int lane = lane_here();
  constexpr int CHUNKS = HEAD_DIM_V / 8, TURNS = (CHUNKS + 3) / 4, SETS = (QUERY_COLUMNS + 7) / 8;
  constexpr int BATCH = TURNS == 1 ? SETS : TURNS == 2 && SETS > 1 ? 2 : 1;  // sets whose loads are under way together
  constexpr int ROWS = ROWS_AT_ONCE;
  const Interval rows = step.new_queries, planes = step.region.query_planes;
  const int height = rows.end - rows.start, count = (planes.end - planes.start) * height;
  if (begin >= count) return false;
  const int column = lane / 4, x = step.region.first[2] - QUERY_PAD + column, length = step.region.length[2];
  const Element* out = from.out + step.out + distance(params.out, 0, 0, x) + lane % 4 * 8;
  const Element* d_out = from.d_out + step.d_out + distance(params.d_out, 0, 0, x) + lane % 4 * 8;
  const float* lse = from.lse + step.lse + distance(params.lse, 0, 0, x);
  const float* d_lse = from.d_lse == nullptr ? nullptr : from.d_lse + step.d_lse + distance(params.d_lse, 0, 0, x);
  const int slot = step.queries.of(rows.start);
  const bool own = lane / 8 == lane % 4;  // whether this lane holds its token's element of the diagonal

#pragma unroll(BATCH == SETS ? SETS : 1)
  for (int first = 0; first < SETS; first += BATCH) {
    uint4 values[ROWS][BATCH][TURNS], gradients[ROWS][BATCH][TURNS];
    float2 given[ROWS][BATCH];  // lse, d_lse
    float2* place[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int i = begin + r, plane = KERNEL_0 == 1 && REGION_0 == 1 ? 0 : i / height, row = i - plane * height;
      const int x0 = planes.start + plane, x1 = rows.start + row;
      const Element *o = shifted(out, params.out, x0, x1, 0), *g = shifted(d_out, params.d_out, x0, x1, 0);
      const float* l = shifted(lse, params.lse, x0, x1, 0);
      const int at = plane * QUERY_RING + Ring<QUERY_RING>::wrapped(slot + row);
      place[r] = reinterpret_cast<float2*>(shared + SCALARS_AT) + at * QUERY_COLUMNS + column;
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        const int further_on = 8 * (first + b);
        const bool inside = i < count && 0 <= x + further_on && x + further_on < length;
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
          const bool present = inside && (4 * turn + 4 <= CHUNKS || 4 * turn + lane % 4 < CHUNKS);
          values[r][b][turn] = gradients[r][b][turn] = uint4{0, 0, 0, 0};
          if (present) {
            values[r][b][turn] = *reinterpret_cast<const uint4*>(further(o, params.out, further_on) + turn * 32);
            gradients[r][b][turn] = *reinterpret_cast<const uint4*>(further(g, params.d_out, further_on) + turn * 32);
          }
        }
        given[r][b] = float2{positive_infinity(), 0.f};
        if (inside) given[r][b].x = *further(l, params.lse, further_on);
        if (inside && d_lse != nullptr) given[r][b].y = *shifted(d_lse, params.d_lse, x0, x1, further_on);
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        float low[4] = {}, high[4] = {};  // of the first rows, of the second ones
#pragma unroll
        for (int turn = 0; turn < TURNS; ++turn) {
          const uint4 o = values[r][b][turn], g = gradients[r][b][turn];
          Mma<Element>::m16n8k16(low, g.x, g.z, g.y, g.w, o.x, o.y, low);
          Mma<Element>::m16n8k16(high, g.x, g.z, g.y, g.w, o.z, o.w, high);
        }
        const float delta = column % 2 == 0 ? low[0] + high[2] : low[1] + high[3];
        const bool present = begin + r < count && 8 * (first + b) + column < QUERY_COLUMNS;
        if (own && present) place[r][8 * (first + b)] = float2{LOG2_E * given[r][b].x, given[r][b].y - delta};
      }
    }
  }
  return true;
}

// Starts the copies of a step's new rows. Each quarter of the warps, LOADERS of them, has one tensor.
constexpr int LOADERS = WARPS / 4;
static_assert(WARPS % 4 == 0, "each tensor has as many warps");

__device__ __forceinline__ void start_loads(const Step& step, unsigned char* shared, const Pointers& from,
                                            const Params& params) {
  const int lane = lane_here(), warp = warp_here();
  const Region& region = step.region;
  const unsigned base = shared_address(shared);
  const int tensor = warp / LOADERS, first = warp % LOADERS;
  if (tensor == 0)
    load_rows<HEAD_DIM, D_TOKEN, K_ROW, KEY_COLUMNS>(base + K_AT, from.k + step.k, params.k, region, region.key_planes,
                                                     step.new_keys, step.keys, KEY_PAD, first, LOADERS, lane);
  else if (tensor == 1)
    load_rows<HEAD_DIM_V, V_TOKEN, V_ROW, KEY_COLUMNS>(base + V_AT, from.v + step.v, params.v, region,
                                                       region.key_planes, step.new_keys, step.keys, KEY_PAD, first,
                                                       LOADERS, lane);
  else if (tensor == 2)
    load_rows<HEAD_DIM, D_TOKEN, Q_ROW, QUERY_COLUMNS>(base + Q_AT, from.q + step.q, params.q, region,
                                                       region.query_planes, step.new_queries, step.queries, QUERY_PAD,
                                                       first, LOADERS, lane);
  else
    load_rows<HEAD_DIM_V, V_TOKEN, G_ROW, QUERY_COLUMNS>(base + G_AT, from.d_out + step.d_out, params.d_out, region,
                                                         region.query_planes, step.new_queries, step.queries,
                                                         QUERY_PAD, first, LOADERS, lane);
}
