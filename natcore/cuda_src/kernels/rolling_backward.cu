// Neighbourhood attention, backward, on tensor cores: maps of any height, as wide as a block, 16-bit elements.
//
// A block marches down the maps of several batch entries, one after another, by bands of two rows of queries. A warp
// has a pair of columns of keys, of which a band sees 8 rows: it finds P and dS of all queries that see them, nothing
// twice, and uses them at once, from its registers, for dK and dV, which stay there while the rows roll through (see
// rolling.cuh). dS goes through shared memory, in 16 bits, to jobs that make dQ of the band's groups of queries.
//
//   1. warps of pairs        S^T = K Q^T, dP^T = V dO^T, P = exp(S - lse), dS = P (dP + d_lse - delta)
//      (rolling_keys.cuh)    dV += P^T dO, dK += dS^T Q; rows that no further band sees are stored
//   2. half of them          dQ^T = K^T dS^T, a group of queries each, of the pairs that it sees, when all dS is there
//      (rolling_queries.cuh)
//   3. the others            delta = dO . O of the band after the next, a group each; in the next band these have dQ
//      (rolling_scalars.cuh)
//
//   columns of keys       .|0 1|2 3|4 5|6 7|8 9|...
//   pair 3 (columns 5, 6)  - - - - - - - - - -       seen by 10 columns of queries, 0 to 9: three groups
//   pair 4 (7, 8)                  - - - - - - - -   by 8, 4 to 11, as all pairs away from borders: two groups
//
// One more warp copies, a few bands ahead (rolling_copies.cuh). A barrier ends each band: a warp arrives when its dS is
// there, and waits when it has done all else that it can. dS is summed for drpb in registers, over all maps of a block;
// then over pairs, then over blocks by sum_drpb: all in a fixed order.
//
// Shared memory (NAT-Tiny, 28x28, one block an SM of 15 + 1 warps): RING rows of K and V, 22 of 15 pairs, 83 KB; five
// bands of Q, dO and O, 53 KB, with lse and d_lse, 2 KB; dS of two bands, 28 KB; sums of drpb from bands near the first
// and last rows, 23 KB; bias tables of 9 pairs, 21 KB; stages, by which results reach 16-byte stores, 8 KB; scalars of
// two bands, 2 KB; what lanes look up, 5 KB.
#include "common/rolling_copies.cuh"
#include "common/rolling_keys.cuh"
#include "common/rolling_queries.cuh"
#include "common/rolling_scalars.cuh"

struct Params {
  Sizes sizes;
  Layout d_out, q, k, v, out, lse, d_lse, rpb, dq, dk, dv;
};

__device__ __forceinline__ void fill_tables(float* tables, const int* firsts, const BiasElement* rpb, const Layout& s,
                                            int length, float unit) {
  const float factor = 1.f / unit;
  for (int i = threadIdx.x; i < TABLES * TABLE; i += THREADS) {
    const int table = i / TABLE, row = i % TABLE / TABLE_ROW, query = i % TABLE_ROW % TABLE_COLUMNS;
    const int pair = table <= FIRST_INNER ? table : table - 1 + (END_INNER - FIRST_INNER);
    const int column = pair * BLOCK_COLUMNS - SHIFT + i % TABLE_ROW / TABLE_COLUMNS;
    float its = copysignf(__int_as_float(0x7f800000), -unit);
    if (pair < PAIRS && row < TABLE_ROWS) {
      const int x = firsts[pair] + query;
      const Interval seen = keys_of(window_of(1), smaller(x, length - 1), length);
      if (x < length && seen.start <= column && column < seen.end) {
#ifdef RPB
        its = widen(rpb[row * s.axis[0] + (column - x + KERNEL_1 - 1) * s.axis[1]]) * factor;
#else
        its = 0.f;
#endif
      }
    }
    tables[i] = its;
  }
}

// What is looked up for each band: see ROWS_AT.
__device__ __forceinline__ void fill_rows(int* rows, const Share& share, int bands) {
  for (int i = threadIdx.x; i < bands * ROWS_OF_BAND; i += THREADS) {
    const int band = i / ROWS_OF_BAND, y = band * BAND + i / BLOCK_ROWS % BAND;
    const int key = share.start_of(band) + i % BLOCK_ROWS, its = key - y + KERNEL_0 - 1;
    const Interval seen = keys_of(window_of(0), smaller(y, share.length[0] - 1), share.length[0]);
    const bool sees = y < share.length[0] && seen.start <= key && key < seen.end;
    rows[i] = (sees ? its : TABLE_ROWS + ((its - TABLE_ROWS) & 7)) * (TABLE_ROW * 4);
  }
  for (int band = threadIdx.x; band <= bands; band += THREADS)
    rows[bands * ROWS_OF_BAND + band] = band < bands ? share.start_of(band) : bands * BAND;
}

// A quarter of the sum of an entry of drpb over pairs. `sums`: [2, PAIRS, SUMS, 32], those of lanes by their
// differences of rows modulo 8, then rare ones.
__device__ __forceinline__ float sum_of_entry(const float* sums, const int* firsts, int entry, int quarter) {
  const int dy = entry / COLUMN_DIFFERENCES - KERNEL_0 + 1, dx = entry % COLUMN_DIFFERENCES - KERNEL_1 + 1;
  float sum = 0.f;
  for (int pair = quarter; pair < PAIRS; pair += 4) {
#pragma unroll
    for (int h = 0; h < BLOCK_COLUMNS; ++h) {
      const int query = pair * BLOCK_COLUMNS - SHIFT + h - dx - firsts[pair];  // a column of the pair's groups
      if (query < 0 || query >= MOST_GROUPS * GROUP_COLUMNS) continue;
#pragma unroll
      for (int i = 0; i < BAND; ++i) {
        const int row = dy + i, rare = row < OFFSET || row >= OFFSET + BLOCK_ROWS;
        const int element = query / GROUP_COLUMNS * 4 + h * 2 + query % 2, lane = (row & 7) * 4 + i * 2 + query % 4 / 2;
        sum += sums[((rare * PAIRS + pair) * SUMS + element) * 32 + lane];
      }
    }
  }
  return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    rolling_backward(const Element* __restrict__ d_out,    // [batch, x0, x1, heads, HEAD_DIM_V]
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
  const Share share(params.sizes);
  const unsigned base = shared_address(shared);
  const float unit = unit_of(scale);
  const int bands = (share.length[0] + BAND - 1) / BAND, slices = params.sizes.slices, batch = params.sizes.batch;
  const int maps = (batch - share.slice + slices - 1) / slices;
  Scalars* scalars = reinterpret_cast<Scalars*>(shared + SCALARS_AT);
  int* firsts = reinterpret_cast<int*>(shared + FIRSTS_AT);

  for (int i = threadIdx.x; i < CLEARED / 16; i += THREADS)
    reinterpret_cast<uint4*>(shared)[i] = make_uint4(0, 0, 0, 0);
  const Step step{base + BARRIER_AT};
  if (threadIdx.x == 0) mbarrier_init(step.barrier, WARPS);
  for (int pair = threadIdx.x; pair < PAIRS; pair += THREADS)
    firsts[pair] = PairQueries(pair, share.length[1]).first;
  __syncthreads();
  fill_tables(reinterpret_cast<float*>(shared + TABLES_AT), firsts,
              rpb + static_cast<long long>(blockIdx.x) * params.rpb.head, params.rpb, share.length[1], unit);
  int* rows = reinterpret_cast<int*>(shared + ROWS_AT);
  fill_rows(rows, share, bands);
  for (int i = threadIdx.x; i < GROUPS * 32; i += THREADS)
    reinterpret_cast<QueryJob*>(shared + JOBS_AT)[i] = QueryJob(params.dq, share, i / 32, i % 32);
  const int* starts = rows + bands * ROWS_OF_BAND;

  Sums sums;
  unsigned number = 0;  // of the band, of all maps
  if (warp == PAIRS) {
    const Cursor start{share.slice, 0};
    const KeyStreams keys{k, v, params.k, params.v, share, start, {}, {}, 0, 0};
    const QueryStreams queries{q,          d_out,      out,          lse,   d_lse, params.q, params.d_out,
                               params.out, params.lse, params.d_lse, share, start, {},       {},
                               {},         0};
    bring(keys, queries, step, base, bands, params.sizes, maps, its_lane);
  } else {
    const PairQueries queries(warp, share.length[1]);
    KeySums key_sums;
    unsigned char* stage = shared + STAGES_AT + warp * STAGE;
    Band band{0, 0, 0, 0};
    int own = 0;
    // Of this lane, from where a row of keys, a band of queries and its dS start; and its columns of the bias table.
    const int token_row = its_lane % 8 / 4, column = queries.first + its_lane % 4;
    const int key_at = anew(K_AT + warp * (BLOCK_COLUMNS * TOKEN) +
                            ((its_lane / 8 % 2 * TOKEN + its_lane / 16 * 16) ^ its_lane % 8 * 16));
    const int query_at = anew(Q_AT + query_place(token_row, column, its_lane / 8));
    const int tokens_at = anew(Q_AT + query_place(token_row, column, its_lane / 16) + its_lane / 8 % 2 * 8 * TOKEN);
    const int weights_at = anew(WEIGHTS_AT + weights_place_of(queries.first, warp, its_lane));
    const int table_at = anew(TABLES_AT + table_of(warp) * (TABLE * 4) + its_lane % 2 * 8);
    const QueryJob* jobs = reinterpret_cast<const QueryJob*>(shared + JOBS_AT) + its_lane;
    // Half of the warps have dQ of a group of a band to make, the others scalars of one of the band after the next, and
    // in the next band it is the other way round, so that all have as much to do, and go ahead in turn.
    const int turned = (warp + PAIRS - PAIRS / 2) % PAIRS;
    // Scalars of a group of the n-th of all bands, of which the map has `rows` rows.
    const auto make_scalars = [&](int group, unsigned n, int slot, int rows, int lane) {
      find_scalars(scalars + n % 2 * (SCALARS / 16), shared + Q_AT + slot * OWN,
                   reinterpret_cast<const float*>(shared + GIVEN_AT + slot * GIVEN), d_lse != nullptr, group, rows,
                   share.length[1], lane);
    };
    step.arrive(its_lane);
    step.wait(0);
    if (warp < GROUPS) {
      make_scalars(warp, 0, 0, share.length[0], its_lane);
      make_scalars(warp, 1, 1, share.length[0] - (bands > 1 ? BAND : 0), its_lane);
    }
    step.arrive(its_lane);
    step.wait(1);
    int its_bias, its_next;
    const auto look_up = [&](int b, int lane) {
      its_bias = rows[b * ROWS_OF_BAND + lane % 4 / 2 * BLOCK_ROWS + band.rows_to(lane / 4)];
      its_next = starts[b + 1];
    };
    look_up(0, its_lane);
#pragma unroll 1
    for (int entry = share.slice; entry < batch; entry += slices) {
      const KeyStores stores(params.dk, params.dv, share, dk, dv, entry, warp, its_lane);
      Element* its_dq = dq == nullptr ? dq : share.base(dq, params.dq, entry);
#pragma unroll 1
      for (int b = 0; b < bands; ++b) {
        const int lane = anew_lane(its_lane);
        // The rows of the bias table for this lane's keys and queries, and where the next band's rows start.
        const int bias = its_bias, next = its_next;
        const int place = band.place_of(lane % 8, share.length[0]);
        if (queries.groups > 0) {
          const unsigned key = base + key_at + place;
          const int offset = band.rows_to(lane / 4), difference = band.start - band.row + offset;
          const Places at{{key, key ^ 32},
                          base + query_at + own * OWN,
                          base + tokens_at + own * OWN,
                          shared,
                          static_cast<int>(weights_at + number % 2 * WEIGHTS),
                          reinterpret_cast<const float*>(shared + table_at + bias),
                          scalars + number % 2 * (SCALARS / 16) + lane % 4 / 2 * (QUERIES / BAND) + queries.first +
                              lane % 2 * 2};
          const bool usual = band.start - band.row == OFFSET;
          const Differences differences{
              usual ? nullptr
                    : reinterpret_cast<float*>(shared + RARE_AT + warp * SUMS_BYTES) + (difference & 7) * 4 + lane % 4,
              difference < OFFSET || difference >= OFFSET + BLOCK_ROWS};
          const bool more = MOST_GROUPS > 2 && queries.groups > 2;
          if (queries.groups > 1) {
            key_sums.add<0, 2>(at, sums, differences, unit * LOG2_E, step, !more, lane);
          } else {
            key_sums.add<0, 1>(at, sums, differences, unit * LOG2_E, step, true, lane);
          }
          if (more) key_sums.add<2, 1>(at, sums, differences, unit * LOG2_E, step, true, lane);
          // After the last band also of rows that the map lacks, so that nothing of this map stays.
          const int end = b + 1 < bands ? next : band.start + BLOCK_ROWS;
#pragma unroll 1
          for (int row = band.start; row < end; row += 2) {
            key_sums.stage(stage, band.slot + row - band.start, smaller(end - row, 2), scale, lane);
            __syncwarp();
            stores.write(stage, row, smaller(smaller(end, share.length[0]) - row, 2), lane);
            __syncwarp();
          }
        } else {
          step.arrive(lane);
        }
        // What can be found before waiting: of the next band, and what dQ of this one needs.
        const int row = band.row, next_band = b + 1 < bands ? b + 1 : 0;
        const int after = next_band + 1 < bands ? next_band + 1 : 0;
        band.advance(next - band.start);
        band.row = next_band * BAND, band.start = next_band > 0 ? next : 0;
        look_up(next_band, lane);
        const int group = number % 2 == 0 ? warp : turned, other = number % 2 == 0 ? turned : warp;
        const bool has_job = dq != nullptr && group < GROUPS;
        const QueryJob job = jobs[has_job ? group * 32 : 0];
        step.wait(number + 2);
        if (has_job)
          find_queries(job, its_dq + row * params.dq.step[0], share.length[0] - row, base + K_AT + place,
                       base + WEIGHTS_AT + number % 2 * WEIGHTS + group * 8 * WEIGHTS_TOKEN, stage, scale, lane);
        if (other < GROUPS)
          make_scalars(other, number, own + 2 < OWN_RING ? own + 2 : own + 2 - OWN_RING,
                       share.length[0] - after * BAND, lane);
        ++number;
        own = own + 1 < OWN_RING ? own + 1 : 0;
      }
    }
  }

#ifdef RPB
  if (drpb_partials == nullptr) return;
  __syncthreads();
  float* all = reinterpret_cast<float*>(shared);
  if (warp < PAIRS) {
    // The last band was number - 1: a lane's difference is its slot less twice that, modulo 8.
    const int at = ((its_lane / 4 - 2 * (static_cast<int>(number) - 1)) & 7) * 4 + its_lane % 4;
#pragma unroll
    for (int i = 0; i < SUMS; ++i) all[(warp * SUMS + i) * 32 + at] = sums.of[i / 4][i % 4];
  }
  for (int i = threadIdx.x; i < PAIRS * SUMS * 32; i += THREADS)
    all[PAIRS * SUMS * 32 + i] = reinterpret_cast<const float*>(shared + RARE_AT)[i];
  __syncthreads();
  float* partials = drpb_partials + (static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x) * ENTRIES;
  for (int first = 0; first < ENTRIES; first += THREADS / 4) {
    const int i = first + threadIdx.x / 4;
    float sum = i < ENTRIES ? sum_of_entry(all, firsts, i, threadIdx.x % 4) : 0.f;
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (i < ENTRIES && threadIdx.x % 4 == 0) partials[i] = sum;
  }
#endif
}
