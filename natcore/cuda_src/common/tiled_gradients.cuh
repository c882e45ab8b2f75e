// The products of the tiled backward's two passes, and the order in which a block works.
#pragma once

#include "common/anew.cuh"
#include "common/tiled_bias.cuh"
#include "common/tiled_loads.cuh"
#include "ptx/math.cuh"
#ifdef FLOAT32
#include "common/tiled_products_float32.cuh"
#else
#include "common/tiled_products.cuh"
#endif

// What all lanes of a warp have alike, so that the compiler knows.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(~0u, value, 0); }

// dq of a tile of queries, or dk and dv of one of keys: n8 tiles of the head's elements, as the products have them.
struct Results {
  float d[D / 8][4], v[V / 8][4];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (auto& tile : d)
#pragma unroll
      for (float& entry : tile) entry = 0.f;
#pragma unroll
    for (auto& tile : v)
#pragma unroll
      for (float& entry : tile) entry = 0.f;
  }
};

// Own vectors as A operands. A lane's two own queries have an LSE, times log2(e), and a negative delta, each twice.
struct Own {
  OwnRows<D> d;
  OwnRows<V> v;
  float lse[2], minus_delta[4];
};

// What one plane of a tile's box gives. `stage` is the plane's place in shared memory, `bias` that of `table_offset`,
// `sums` those of the plane.
template <bool PLAIN>
__device__ __forceinline__ void differentiate(Results& results, const Own& own, const Tile& tile, const Region& region,
                                              const unsigned char* stage, const float* bias, float4* sums, float unit,
                                              int lane) {
  Sight sight;
  if (!PLAIN) sight.look(tile, region, lane);
  const int lines = uniform(tile.lines()), steps = uniform(tile.steps()), column = lane % 4 * 2;
#pragma unroll 1
  for (int line = 0; line < lines; ++line) {
    const int line_y = STEP_ROWS == 2 ? 0 : line, line_x = STEP_ROWS == 2 ? 8 * line : 0;  // in the box
    const int y = tile.rows.start + line_y, x = tile.columns.start + line_x;
    const unsigned slot = (y - region.row) * SPAN_2 + x - region.column;
    // This lane's seen token of the first step, as a row of B and of its transpose.
    const unsigned token = slot + lane % 8 + lane / 16 * SIDE_SLOTS;
    const unsigned token_t = slot + transposed_token(lane);
    unsigned d = shared_address(stage) + token * D_PITCH, v = shared_address(stage) + SEEN_V_AT + token * V_PITCH;
    const unsigned transposed_d = (token_t - token) * D_PITCH, transposed_v = (token_t - token) * V_PITCH;
    const float2* scalars = reinterpret_cast<const float2*>(stage + SCALARS_AT) + slot + column;
    const float* its_bias = bias + SIGN * (y * TABLE_ROW + x);
    LineSums line_sums(sums + line * ((STEPS + 1) * 32) + lane);
    unsigned mask[2][2];  // of own token h and, where steps have two rows, the lane's column e
#pragma unroll
    for (int i = 0; i < 4 && !PLAIN; ++i)
      mask[i / 2][i % 2] =
          STEP_ROWS == 2 ? mask_of(sight.columns[i / 2], line_x + column + i % 2) : mask_of(sight.rows[i / 2], line_y);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      float p[2][4], ds[2][4], lse[2][2];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int bias_at = side * SECOND_SIDE + i / 2 * SECOND_TOKEN + i % 2 * NEXT_COLUMN;
          p[side][i] = PLAIN || BIASED ? its_bias[bias_at] : 0.f;
        }
#pragma unroll
        for (int e = 0; e < 2 && OWN_KEYS; ++e) {
          const float2 scalar = scalars[side * SIDE_SLOTS + e];
          lse[side][e] = scalar.x, ds[side][e] = ds[side][e + 2] = scalar.y;
        }
      }
      const unsigned its_column = SCARCE ? anew(token) : token;
      multiply<D>(p, p[0], p[1], own.d, d, its_column, lane);
      if (OWN_KEYS) {
        multiply<V>(ds, ds[0], ds[1], own.v, v, its_column, lane);
      } else {
        multiply<V>(ds, own.minus_delta, own.minus_delta, own.v, v, its_column, lane);
      }
#pragma unroll
      for (int side = 0; side < 2; ++side)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int h = i / 2, e = i % 2;
          p[side][i] = ex2_approx(__fmaf_rn(p[side][i], unit, -(OWN_KEYS ? lse[side][e] : own.lse[h])));
          if (!PLAIN) {
            const unsigned other = STEP_ROWS == 2 ? mask_of(sight.rows[h], 2 * step + side)
                                                  : mask_of(sight.columns[h], 16 * step + 8 * side + column + e);
            p[side][i] = __uint_as_float(__float_as_uint(p[side][i]) & mask[h][e] & other);
          }
          ds[side][i] *= p[side][i];
        }
      const unsigned column_t = SCARCE ? anew(token_t) : token_t;
      if (OWN_KEYS) accumulate<V>(results.v, p, v + transposed_v, column_t, lane);
      if (BIASED && !OWN_KEYS) line_sums.add(ds);
      accumulate<D>(results.d, ds, d + transposed_d, column_t, lane);
      d += STEP_SLOTS * D_PITCH, v += STEP_SLOTS * V_PITCH;
      scalars += STEP_SLOTS, its_bias += NEXT_STEP;
    }
    if (BIASED && !OWN_KEYS) line_sums.finish();
  }
}

// The items of a slice: equal shares, the first ones one longer where they do not divide.
__device__ __forceinline__ Interval share_of(const Sizes& sizes, int slice) {
  const int each = sizes.items / sizes.slices, longer = sizes.items % sizes.slices;
  const int start = slice * each + smaller(slice, longer);
  return {start, start + each + (slice < longer ? 1 : 0)};
}

// Works through a slice's regions, plane by plane; what comes next is copied meanwhile. Of a Pass:
//   load_seen(region, head, plane, stage), load_own(region, tile, own)   start copies; `own` is the place, 0 or 1
//   State                                       what a warp knows of its tile; its results
//   announce(state, region, tile)               before the own tokens are there
//   begin(state, region, tile, own)             reads the own tokens; results are zeros
//   add(state, region, tile, head, plane, stage)
//   end(state, region, tile)                    stores
//   change(next, tile)                          whether the sums of earlier tiles cannot go on with this tile
//   flush()                                     by the whole block, between barriers
//   clear(region, tile)                         begins the warp's sums
template <typename Pass>
__device__ __forceinline__ void work(Pass& pass, const Sizes& sizes, unsigned char* shared, int slice, int warp) {
  Region* regions = reinterpret_cast<Region*>(shared + REGIONS_AT);  // three in turn
  volatile int* flags = reinterpret_cast<volatile int*>(shared + FLAGS_AT);  // of regions; the end of the share
  if (threadIdx.x == 0) {
    const Interval share = share_of(sizes, slice);
    flags[3] = share.end;
    regions[0].find_from(sizes, share.start, share.end);
    regions[1].find_after(regions[0], sizes, share.end);
  }
  __syncthreads();
  if (regions[0].item < 0) return;
  Tile* tiles = reinterpret_cast<Tile*>(shared + TILES_AT + 2 * TILE * warp);  // the one at hand and the next
  int stage = 0, turn = 0, parity = 0, own = 0;
  pass.load_seen(regions[0], 0, regions[0].planes.start, 0);
  tiles[0] = Tile(regions[0], warp);  // all lanes write the same
  __syncwarp();
  if (tiles[0].exists) pass.load_own(regions[0], tiles[0], 0);
  if (pass.change(regions[0], tiles[0])) flags[0] = 1;
#pragma unroll 1
  while (true) {
    const Region& region = regions[turn];
    const Tile& tile = tiles[parity];
    const bool exists = uniform(tile.exists);
    typename Pass::State state;  // nothing of it outlives the region, which the compiler must see
    const int next_turn = turn == 2 ? 0 : turn + 1;
    const Region& next = regions[next_turn];
    pass.announce(state, region, tile);
    int head = 0, plane = uniform(region.planes.start);
    bool last;
#pragma unroll 1
    do {
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();  // this plane is there, and nobody reads the one before
      const bool last_plane = PLANES == 1 || plane + 1 == uniform(region.planes.end);
      last = last_plane && head + 1 == SEEN_HEADS;
      const auto load_next = [&]() {
        const int at = STAGES == 2 ? stage ^ 1 : 0;
        if (!last) {
          pass.load_seen(region, last_plane ? head + 1 : head, last_plane ? region.planes.start : plane + 1, at);
        } else if (next.item >= 0) {
          pass.load_seen(next, 0, next.planes.start, at);
        }
      };
      if (STAGES == 2) load_next();
      if (head == 0 && (PLANES == 1 || plane == uniform(region.planes.start))) {
        if (BIASED && !OWN_KEYS && flags[turn]) {
          pass.flush();
          __syncthreads();
          pass.clear(region, tile);
        }
        pass.begin(state, region, tile, own);
        __syncwarp();
        if (next.item >= 0) {
          Tile& its = tiles[parity ^ next.moved];
          if (next.moved) {
            its = Tile(next, warp);
            __syncwarp();
            if (pass.change(next, its)) flags[next_turn] = 1;
          }
          if (its.exists) pass.load_own(next, its, OWN_STAGES - 1 - own);
        }
        const int last_turn = next_turn == 2 ? 0 : next_turn + 1;
        if (threadIdx.x == THREADS - 1) {
          flags[last_turn] = 0;
          regions[last_turn].find_after(next, sizes, flags[3]);
        }
        __syncwarp();
      }
      if (exists) pass.add(state, region, tile, head, plane, shared + stage * STAGE);
      if (STAGES == 1) {
        __syncthreads();  // the plane has been read
        load_next();
      } else {
        stage ^= 1;
      }
      if (last_plane) ++head;
      plane = last_plane ? uniform(region.planes.start) : plane + 1;
    } while (!last);
    if (exists) pass.end(state, region, tile);
    if (next.item < 0) return;
    turn = next_turn;
    parity ^= next.moved;
    own = OWN_STAGES - 1 - own;
  }
}
