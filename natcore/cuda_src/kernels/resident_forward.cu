// Neighbourhood attention, forward, on tensor cores: maps that fit into the shared memory of a block, 16-bit elements.
//
// A block keeps a head and a dilation group and takes the maps of several batch entries one after another; the next
// STAGES - 1 are on their way to shared memory meanwhile. A warp has half a band of queries in every map, so that what
// its scores start from, bias and mask alike, is made once, and stays in registers as the C operand of its products:
//
//   S = Q K^T + C, P = exp2(unit (S - max)), O = P V    16 queries x 8 keys a product, whole rows of S in registers
//
//   14x14, kernel 7            . . . . . . . . . . . . . .
//                              k k k k k k k k k k . . . .    the half band's 14 queries (2 idle of 16), 2 x 7
//   half 0 of band 2           k k k k k k k k k k . . . .
//                              k k k k k k k k k k . . . .    all they see: 8 rows of SEEN = 10 columns. The keys of a
//                              q q q q q q q k k k . . . .    column are one side of a product
//                              q q q q q q q k k k . . . .
//                              k k k k k k k k k k . . . .    bands near a border see fewer rows: the mask has the rest
//                              . . .
//
// Warps wait for nobody but their maps: barriers say when queries and keys are there, when values are, and when all
// have done with a map. Warps without half a band copy, or else all do; the first map all copy together, so that it is
// there early, and the bias is fetched even before.
//
// Shared memory (NAT-Tiny, 14x14, one block an SM of 14 + 2 warps): STAGES maps, each K, V and Q, 14 rows of 14
// columns, 37 KB; 1 KB for each warp, by which results reach 16-byte stores, 14 KB; what lanes look up, 16 KB;
// barriers; the bias table, 1 KB. With 3 stages 141 KB.
#include "common/resident_band.cuh"
#include "common/resident_stores.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"

struct Params {
  Sizes sizes;
  Layout q, k, v, rpb, out, lse;
};

// S = start + Q K^T. `keys` is where this lane finds its chunk of columns 0 and 1.
__device__ __forceinline__ void score(Scores& s, const Scores& start, const unsigned (&query)[D_STEPS][4],
                                      const unsigned (&keys)[2]) {
#pragma unroll
  for (int j = 0; j < SEEN; ++j) {
    if (j == 4) __syncwarp();  // else the compiler loads more keys at once than it has registers for
    unsigned key[4];
    ldmatrix_x4(key, keys[j % 2] + j / 2 * (2 * TOKEN));
    const float(&sum)[4] = s[j];
#pragma unroll
    for (int step = 0; step < D_STEPS; ++step)
      Mma<Element>::m16n8k16(s[j], query[step][0], query[step][1], query[step][2], query[step][3], key[2 * step],
                             key[2 * step + 1], step == 0 ? start[j] : sum);
  }
}

// The greatest score of each row, of a lane's two queries.
__device__ __forceinline__ void find_top(float (&top)[2], const Scores& s) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float its = fmaxf(s[0][2 * h], s[0][2 * h + 1]);
#pragma unroll
    for (int j = 1; j < SEEN; ++j) its = fmaxf(its, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
    its = fmaxf(its, __shfl_xor_sync(~0u, its, 1));
    top[h] = fmaxf(its, __shfl_xor_sync(~0u, its, 2));
  }
}

// O = P V and, by a product with ones, the sum of each row of P as it is rounded; P = exp2(unit (S - top)). `values` is
// where this lane finds its chunks of columns 0 and 1 and, if SEEN is odd, `last` its chunk of the last column.
__device__ __forceinline__ void weigh(float (&o)[V_CHUNKS][4], float (&sum)[4], Scores& s, const float (&top)[2],
                                      float unit, unsigned values, unsigned last) {
  const float shift[2] = {top[0] * unit, top[1] * unit};
  const unsigned ones = pack<Element>(1.f, 1.f);
#pragma unroll
  for (int j = 0; j < SEEN; j += 2) {
    unsigned p[4], value[4][2];
#pragma unroll
    for (int n = j; n < j + 2 && n < SEEN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = ex2_approx(__fmaf_rn(s[n][i], unit, -shift[i / 2]));
      p[n % 2 * 2] = pack<Element>(s[n][0], s[n][1]), p[n % 2 * 2 + 1] = pack<Element>(s[n][2], s[n][3]);
    }
    if (j + 1 < SEEN) {
#pragma unroll
      for (int c = 0; c < V_CHUNKS; c += 2) {
        unsigned four[4];
        ldmatrix_x4_transposed(four, (c == 0 ? values : values ^ 32) + j * TOKEN);
        value[c][0] = four[0], value[c][1] = four[1], value[c + 1][0] = four[2], value[c + 1][1] = four[3];
      }
    } else {
      unsigned four[4];
      ldmatrix_x4_transposed(four, last);
#pragma unroll
      for (int c = 0; c < V_CHUNKS; ++c) value[c][0] = four[c];
    }
    if (j + 1 < SEEN) {
      Mma<Element>::m16n8k16(sum, p[0], p[1], p[2], p[3], ones, ones, sum);
    } else {
      Mma<Element>::m16n8k8(sum, p[0], p[1], ones, sum);
    }
#pragma unroll
    for (int c = 0; c < V_CHUNKS; ++c) {
      if (j + 1 < SEEN) {
        Mma<Element>::m16n8k16(o[c], p[0], p[1], p[2], p[3], value[c][0], value[c][1], o[c]);
      } else {
        Mma<Element>::m16n8k8(o[c], p[0], p[1], value[c][0], o[c]);
      }
    }
  }
}

// What is copied.
struct Maps {
  const Element *q, *k, *v;
  const Params& params;
  const Share& share;

  // Starts a thread's copies of a batch entry's queries and keys, or of its values, to `map`.
  template <typename Copies>
  __device__ __forceinline__ void load_keys(const Copies& copies, int entry, unsigned map) const {
    copies.template load<HEAD_DIM, KeyPlaces>(map + K_AT, share.base(k, params.k, entry, blockIdx.x / HEADS_PER_KV),
                                              params.k, share);
    copies.template load<HEAD_DIM, QueryPlaces>(map + Q_AT, share.base(q, params.q, entry), params.q, share);
  }
  template <typename Copies>
  __device__ __forceinline__ void load_values(const Copies& copies, int entry, unsigned map) const {
    copies.template load<HEAD_DIM_V, KeyPlaces>(map + V_AT, share.base(v, params.v, entry, blockIdx.x / HEADS_PER_KV),
                                                params.v, share);
  }
  // Of all of it, of which the barriers of `slot` will tell.
  __device__ __forceinline__ void load(int entry, unsigned maps, const Barriers& barriers, int slot) const {
    const Copies<> copies;
    load_keys(copies, entry, maps + slot * MAP);
    cp_async_arrive(barriers.keys(slot));
    load_values(copies, entry, maps + slot * MAP);
    cp_async_arrive(barriers.values(slot));
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    resident_forward(const Element* __restrict__ q,        // [batch, x0, x1, heads, HEAD_DIM]
                     const Element* __restrict__ k,        // [batch, x0, x1, heads / heads_per_kv, HEAD_DIM]
                     const Element* __restrict__ v,        // [batch, x0, x1, heads / heads_per_kv, HEAD_DIM_V]
                     const BiasElement* __restrict__ rpb,  // [heads, 2 k0 - 1, 2 k1 - 1]
                     Element* __restrict__ out,            // [batch, x0, x1, heads, HEAD_DIM_V]
                     float* __restrict__ lse,              // [batch, x0, x1, heads], or null
                     const float scale, const __grid_constant__ Params params) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), its_lane = threadIdx.x % 32;
  const BiasShare bias(rpb, params.rpb);
  const Share share(params.sizes);
  const unsigned base = shared_address(shared);
  const Barriers barriers{base + BARRIERS_AT};
  const int step = params.sizes.slices, batch = params.sizes.batch;
  const Maps maps{q, k, v, params, share};
  if (threadIdx.x == 0) barriers.make();
  {
    const Copies<0> copies;
    maps.load_keys(copies, share.slice, base);
    __syncthreads();  // barriers are there
    cp_async_arrive(barriers.first_keys());
    maps.load_values(copies, share.slice, base);
    cp_async_arrive(barriers.first_values());
  }
  if (!SEPARATE || warp >= WORKERS) {
    mbarrier_arrive(barriers.keys(0));
    mbarrier_arrive(barriers.values(0));
    Turn<STAGES> turn;
    turn.advance();
    int entry = share.slice + step;
#pragma unroll 1
    for (int n = 1; entry < batch && (SEPARATE || n < STAGES); ++n, entry += step, turn.advance()) {
      if (SEPARATE && n >= STAGES) mbarrier_wait(barriers.free(turn.slot), turn.phase ^ 1);
      maps.load(entry, base, barriers, turn.slot);
    }
    if (SEPARATE) {
      cp_async_wait_all();
      return;
    }
  }

  const ScaleParts parts(scale);
  float* table = reinterpret_cast<float*>(shared + TABLE_AT);
  bias.write(table, parts.bias);
  clear_missing(shared, share);
  named_barrier_sync(1, 32 * WORKERS);
  Operands& lookup = reinterpret_cast<Operands*>(shared + LOOKUPS_AT)[threadIdx.x];
  Results& results = reinterpret_cast<Results*>(shared + LOOKUPS_AT + WORKERS * 32 * sizeof(Operands))[threadIdx.x];
  Scores start;
  {
    const Half half(share, warp);
    lookup = find_operands(half, share, its_lane);
    results = find_results(half, share, params.out, params.lse, its_lane);
    find_start(start, table, half, share, its_lane);
  }

  Turn<STAGES> turn, last;
#pragma unroll 1
  for (int entry = share.slice; entry < batch; entry += step, turn.advance()) {
    const int lane = anew_lane(its_lane);
    const unsigned map = base + turn.slot * MAP;
    const Operands& at = lookup;  // read where it is needed
    const unsigned key = map + K_AT + at.key, keys[2] = {key, (key ^ TOKEN) + at.odd};
    if (entry == share.slice) mbarrier_wait(barriers.first_keys(), 0);
    mbarrier_wait(barriers.keys(turn.slot), turn.phase);
    unsigned query[D_STEPS][4];
#pragma unroll
    for (int c = 0; c < D_STEPS; ++c) {
      ldmatrix_x4(query[c], map + Q_AT + (c == 0 ? at.query : at.query ^ 32));
      if (parts.query != 1.f) {
#pragma unroll
        for (unsigned& pair : query[c])
          pair = pack<Element>(parts.query * low<Element>(pair), parts.query * high<Element>(pair));
      }
    }
    Scores s;
    score(s, start, query, keys);
    float top[2], sum[4] = {}, o[V_CHUNKS][4] = {};
    find_top(top, s);
    if (entry == share.slice) mbarrier_wait(barriers.first_values(), 0);
    mbarrier_wait(barriers.values(turn.slot), turn.phase);
    weigh(o, sum, s, top, parts.unit, map + V_AT + at.value, map + V_AT + at.key + SEEN / 2 * (2 * TOKEN));
    __syncwarp();
    if (lane == 0) mbarrier_arrive(barriers.free(turn.slot));

    unsigned char* stage = shared + STAGES_AT + warp * STAGE;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float factor = rcp_approx(sum[2 * h]);
      unsigned r[4] = {};
#pragma unroll
      for (int c = 0; c < V_CHUNKS; ++c) r[c] = pack<Element>(o[c][2 * h] * factor, o[c][2 * h + 1] * factor);
      stage_tokens<false>(stage + h * 8 * TOKEN, r, lane);
    }
    const Results to = results;
    const Stores stores{share.base(out, params.out, entry) + to.out, params.out.step[0], to.first != 0, to.second != 0};
    stores.write(stage, lane);
    if (lse != nullptr && to.its_lse) {
      const float its_top = lane % 2 == 0 ? top[0] : top[1], its_sum = lane % 2 == 0 ? sum[0] : sum[2];
      share.base(lse, params.lse, entry)[to.lse] = (its_top * parts.unit + lg2_approx(its_sum)) * LN_2;
    }
    // Where all copy, the place of the map before this one, with which the others will be done too, gets a new one.
    if (SEPARATE || entry < share.slice + step) continue;
    if (entry + (STAGES - 1) * step < batch) {
      mbarrier_wait(barriers.free(last.slot), last.phase);
      maps.load(entry + (STAGES - 1) * step, base, barriers, last.slot);
    }
    last.advance();
  }
}
