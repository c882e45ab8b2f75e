// Neighbourhood attention, backward, on tensor cores: maps that fit into the shared memory of a block, 16-bit elements.
//
// A block has the whole map of a (batch entry, head, dilation group), so that nothing is computed twice, and the next
// one on its way. In a phase (mostly there is one) it takes some pairs of columns of keys:
//
//   1. a warp has half a band of queries and finds P and dS of its units (see resident.cuh), which it keeps, in 16
//      bits, in shared memory, and uses at once for dQ, in its registers (common/resident_weights.cuh)
//
//        S^T = K Q^T, dP^T = V dO^T, P = exp(S - lse), dS = P (dP + d_lse - delta), dQ^T += K^T dS^T
//
//   2. a warp has a pair of columns, whole, and one of dV += P^T dO and dK += dS^T Q: it reads what all bands have kept
//      (common/resident_keys.cuh). The rows of a unit are those of its band's keys; ldmatrix takes each row of an
//      operand from where it lies, and zeros for those that the band does not see.
//
//      rows of keys                band 0   k k k k k k k k . . . . . .     a column of keys is one side of an mma,
//      in a column of the map      band 2   . k k k k k k k k . . . . .     whatever rows a band sees
//      (14x14, kernel 7)           band 3   . . . k k k k k k k k . . .
//
// delta = dO . O comes from O, which comes with the queries. dS is summed for drpb in registers, over all maps of a
// block; then over half bands, then over blocks by sum_drpb: all in a fixed order.
//
// Shared memory (NAT-Tiny, 14x14, one block an SM): two maps, each K and V, 14 rows of 8 pairs, 28 KB, and Q, dO and O,
// 7 bands of 4 groups, 42 KB; 18 units of each of 7 bands, 63 KB; 1 KB for each warp, by which results reach 16-byte
// stores, 16 KB; scalars of queries, 2 KB; the bias table, 2 KB; what lanes look up, 1 KB.
#include "common/resident_keys.cuh"
#include "common/resident_weights.cuh"

struct Params {
  Sizes sizes;
  Layout d_out, q, k, v, out, lse, d_lse, rpb, dq, dk, dv;
};

// The columns that query lane / 4 of a group lacks, of the four of a lane's B operands of a product along columns.
// Element e of part h (8 columns) of group g of a half is bit 16 e + 2 g + h.
__device__ __forceinline__ unsigned lacking(const Share& share, int half, int lane) {
  unsigned bits = 0;
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    const int query = smaller((2 * half + g) * GROUP_COLUMNS + lane / 4 / BAND, share.length[1] - 1);
    const Interval seen = keys_of(window_of(1), query, share.length[1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 8 * (i / 2) + lane % 4 * 2 + i % 2 - SHIFT;
      if (column < seen.start || column >= seen.end) bits |= 1u << (16 * (i % 2) + 2 * g + i / 2);
    }
  }
  return bits;
}

// What is looked up for each map.
__device__ __forceinline__ void fill_lookups(unsigned char* shared, const Share& share) {
  for (int i = threadIdx.x; i < PLACES; i += THREADS) {
    const int band = i / 16, start = share.start_of(band), row = i % 16 - start;
    reinterpret_cast<int*>(shared + PLACES_AT)[i] =
        band < BANDS && 0 <= row && row < BLOCK_ROWS ? band * OF_BAND + row * 16 : (row & (BLOCK_ROWS - 1)) * 16 + 1;
    if (band >= BANDS) continue;
    if (i % 16 == 0) reinterpret_cast<int*>(shared + STARTS_AT)[band] = start;
    const int query = smaller(band * BAND + i / 8 % 2, share.length[0] - 1), key = start + i % 8;
    const Interval seen = keys_of(window_of(0), query, share.length[0]);
    const int difference = key - query + KERNEL_0 - 1;
    const int its_row = seen.start <= key && key < seen.end ? difference : masked_row(difference);
    reinterpret_cast<int*>(shared + BIAS_AT)[i] = its_row * TABLE_ROW - SHIFT - LEAST_DIFFERENCE;
  }
  for (int i = threadIdx.x; i < HALVES * 32; i += THREADS)
    reinterpret_cast<unsigned*>(shared + LACKS_AT)[i] = lacking(share, i / 32, i % 32);
}

// A quarter of the sum of an entry of drpb over half bands. `sums`: [BANDS, HALVES, DISTANCES, 4, SUMS_ROW], the
// registers of their lanes.
__device__ __forceinline__ float sum_of_entry(const float* sums, const int* starts, int entry, int quarter) {
  const int dy = entry / COLUMN_DIFFERENCES - KERNEL_0 + 1, dx = entry % COLUMN_DIFFERENCES - KERNEL_1 + 1;
  float sum = 0.f;
  for (int band = quarter; band < BANDS; band += 4) {
#pragma unroll
    for (int query = 0; query < 8; ++query) {
      const int row = band * BAND + query % BAND + dy - starts[band];
      const int column = query / BAND + dx + SHIFT - BLOCK_COLUMNS * LEAST;  // from the first distance's on
      if (row < 0 || row >= BLOCK_ROWS || column < 0 || column >= BLOCK_COLUMNS * DISTANCES) continue;
      const int element = column % BLOCK_COLUMNS * 2 + query % 2, lane = row * 4 + query / 2;
#pragma unroll
      for (int half = 0; half < HALVES; ++half)
        sum += sums[(band * HALVES + half) * (SUMS / 4) + (column / BLOCK_COLUMNS * 4 + element) * SUMS_ROW + lane];
    }
  }
  return sum;
}

__device__ __forceinline__ void fill_table(float* table, const BiasElement* rpb, const Layout& s, float unit) {
  const float factor = 1.f / unit;
  for (int i = threadIdx.x; i < TABLE; i += THREADS) {
    const int row = i / TABLE_ROW, column = i % TABLE_ROW + LEAST_DIFFERENCE + KERNEL_1 - 1;
    float its = copysignf(__int_as_float(0x7f800000), -unit);
    if (row < TABLE_ROWS && 0 <= column && column < COLUMN_DIFFERENCES) {
#ifdef RPB
      its = widen(rpb[row * s.axis[0] + column * s.axis[1]]) * factor;
#else
      its = 0.f;
#endif
    }
    table[i] = its;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    resident_backward(const Element* __restrict__ d_out,    // [batch, x0, x1, heads, HEAD_DIM_V]
                      const Element* __restrict__ q,        // [batch, x0, x1, heads, HEAD_DIM]
                      const Element* __restrict__ k,        // [batch, x0, x1, heads, HEAD_DIM]
                      const Element* __restrict__ v,        // [batch, x0, x1, heads, HEAD_DIM_V]
                      const Element* __restrict__ out,      // [batch, x0, x1, heads, HEAD_DIM_V]
                      const float* __restrict__ lse,        // [batch, x0, x1, heads]
                      const float* __restrict__ d_lse,      // [batch, x0, x1, heads], or null: zeros
                      const BiasElement* __restrict__ rpb,  // [heads, 2 k0 - 1, 2 k1 - 1]
                      Element* __restrict__ dq, Element* __restrict__ dk, Element* __restrict__ dv,  // or null
                      float* __restrict__ drpb_partials,  // [slices, groups, heads, 2 k0 - 1, 2 k1 - 1], or null
                      const float scale, const __grid_constant__ Params params) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), its_lane = threadIdx.x % 32;
  const int band = warp / HALVES, half = warp % HALVES, groups = smaller(GROUPS - 2 * half, 2);
  const Share share(params.sizes);
  const float unit = unit_of(scale);
  const unsigned base = shared_address(shared);
  unsigned char* stage = shared + STAGES_AT + warp * STAGE;
  Scalars& its_scalars = reinterpret_cast<Scalars*>(shared + SCALARS_AT)[warp];
  const float* table = reinterpret_cast<const float*>(shared + TABLE_AT);
  const int* starts = reinterpret_cast<const int*>(shared + STARTS_AT);
  const int* places = reinterpret_cast<const int*>(shared + PLACES_AT);
  const bool has_half = band < BANDS;

  for (int i = threadIdx.x; i < UNITS_AT / 16; i += THREADS)
    reinterpret_cast<uint4*>(shared)[i] = make_uint4(0, 0, 0, 0);
  fill_lookups(shared, share);
  __syncthreads();
  const auto load_operands = [&](int entry, unsigned map) {
    if (warp < FIRST_COPIER || entry >= params.sizes.batch) return;
    const Copies<> copies;
    copies.load<HEAD_DIM, KeyPlaces>(map + K_AT, share.base(k, params.k, entry), params.k, share);
    copies.load<HEAD_DIM, QueryPlaces>(map + Q_AT, share.base(q, params.q, entry), params.q, share);
    copies.load<HEAD_DIM_V, QueryPlaces>(map + G_AT, share.base(d_out, params.d_out, entry), params.d_out, share);
    copies.load<HEAD_DIM_V, KeyPlaces>(map + V_AT, share.base(v, params.v, entry), params.v, share);
    copies.load<HEAD_DIM_V, QueryPlaces>(map + O_AT, share.base(out, params.out, entry), params.out, share);
  };
  const auto load_its_scalars = [&](int entry) {
    if (has_half && entry < params.sizes.batch)
      load_scalars(its_scalars, share.base(lse, params.lse, entry),
                   d_lse == nullptr ? nullptr : share.base(d_lse, params.d_lse, entry), params.lse, params.d_lse, share,
                   band * BAND, 2 * half * GROUP_COLUMNS, anew_lane(its_lane));
  };
  load_operands(share.slice, base);
  load_its_scalars(share.slice);
  fill_table(reinterpret_cast<float*>(shared + TABLE_AT), rpb + static_cast<long long>(blockIdx.x) * params.rpb.head,
             params.rpb, unit);
  Sums sums = {};

  int at_map = 0;
#pragma unroll 1
  for (int entry = share.slice; entry < params.sizes.batch; entry += params.sizes.slices) {
    const int lane = anew_lane(its_lane), next = entry + params.sizes.slices;
    const unsigned map = base + at_map;
    cp_async_wait_all();
    __syncthreads();  // the map is there, and nobody needs the one before
    load_operands(next, base + MAP - at_map);
    if (has_half) {
      const int queries = (band * GROUPS + 2 * half) * 8 * TOKEN;
      find_scalars(its_scalars, shared + at_map + G_AT + queries, shared + at_map + O_AT + queries, groups, lane);
    }
    Queries its_dq = {};
#pragma unroll
    for (int phase = 0; phase < PHASES; ++phase) {
      if (has_half) {
        const int row = smaller(starts[band] + lane % 8, share.length[0] - 1);
        const unsigned key = map + K_AT + KeyPlaces::at(row, lane / 8 % 2 - SHIFT, lane / 16);
        const unsigned key_t = map + K_AT + KeyPlaces::at(row, lane / 16 - SHIFT, lane / 8 % 2);
        const unsigned query = map + Q_AT + ((band * GROUPS + 2 * half) * 8 + lane % 8) * TOKEN +
                               QueryRows::chunk(lane % 8, lane / 8);
        const int* bias = reinterpret_cast<const int*>(shared + BIAS_AT) + band * 16 + lane / 4;
        const Places at{{key, key ^ 32},
                        {key_t, key_t ^ 32},
                        query,
                        shared + UNITS_AT + band * OF_BAND + lane * OF_LANE,
                        {table + bias[0] - lane % 4, table + bias[8] - lane % 4},
                        its_scalars};
        const unsigned lacks = reinterpret_cast<const unsigned*>(shared + LACKS_AT)[half * 32 + lane];
        if (half == 0) {
          find_weights<0>(phase, its_dq, sums, at, lacks, unit * LOG2_E, lane);
        } else {
          find_weights<1>(phase, its_dq, sums, at, lacks, unit * LOG2_E, lane);
        }
        if (phase == PHASES - 1 && dq != nullptr)
          write_queries(share.base(dq, params.dq, entry), params.dq, share, its_dq, band * BAND,
                        2 * half * GROUP_COLUMNS, stage, scale, lane);
      }
      __syncthreads();  // all units are there; after the last phase's, its scalars are not needed
      if (phase == PHASES - 1) load_its_scalars(next);
#pragma unroll 1
      for (int job = warp; job < 2 * AT_ONCE; job += WARPS) {
        const int pair = phase * AT_ONCE + job / 2;
        if (pair >= PAIRS) break;
        const int lane = anew_lane(its_lane);
        if (job % 2 == 0 && dv != nullptr)
          find_keys<HEAD_DIM_V>(share.base(dv, params.dv, entry), params.dv, share, pair, base + UNITS_AT, map + G_AT,
                                base + ZEROS_AT, places, stage, 1.f, lane);
        if (job % 2 == 1 && dk != nullptr)
          find_keys<HEAD_DIM>(share.base(dk, params.dk, entry), params.dk, share, pair, base + UNITS_AT + WEIGHTS,
                              map + Q_AT, base + ZEROS_AT, places, stage, scale, lane);
      }
      if (phase < PHASES - 1) __syncthreads();  // units may be others'
    }
    at_map = MAP - at_map;
  }

#ifdef RPB
  if (drpb_partials == nullptr) return;
  __syncthreads();
  if (has_half) {
    float* its = reinterpret_cast<float*>(shared + warp * SUMS) + its_lane;
#pragma unroll
    for (int d = 0; d < DISTANCES; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) its[(d * 4 + i) * SUMS_ROW] = sums[d][i];
  }
  __syncthreads();
  float* partials = drpb_partials + (static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x) * ENTRIES;
  for (int first = 0; first < ENTRIES; first += THREADS / 4) {
    const int i = first + threadIdx.x / 4;
    const float* sums_of_halves = reinterpret_cast<const float*>(shared);
    float sum = i < ENTRIES ? sum_of_entry(sums_of_halves, starts, i, threadIdx.x % 4) : 0.f;
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (i < ENTRIES && threadIdx.x % 4 == 0) partials[i] = sum;
  }
#endif
}
