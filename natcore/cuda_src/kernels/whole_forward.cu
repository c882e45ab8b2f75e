// Neighbourhood attention, forward, on tensor cores: maps of at most 64 tokens, 16-bit elements.
//
// All queries see all keys. A warp takes the map of a (batch entry, head, dilation group), or two share its queries: it
// forms S = Q K^T for two tiles of queries at a time, the softmax of whole rows, and O = P V, which leaves from
// registers. Two such pairs go side by side, so that one's products hide the other's softmax. Maps come to shared
// memory as a team of warps needs them (see whole_team.cuh); teams wait for nobody else, but once for the bias.
//
//   team 0   | q k v of batch entry b      | S, P, O | ...        slots of shared memory, STAGES a team: the copies of
//   team 1   | q k v of batch entry b + 1  |   S, P, O | ...      the next maps are under way meanwhile
//   ...
//
//   7 x 7:  keys  0-7  8-15 ... 48-55        tiles are rows of the map (see whole_map.cuh)
//   queries 0-7   bias  bias    bias
//           8-15  bias  bias    bias         S starts from the bias, which depends on the distance of two tiles,
//           ...                              here of two rows
//
// Shared memory, bytes: the bias (struct Scores), two barriers for each team and stage and one for the bias; then for
// each team and stage K, V and Q, ROWS rows of HEADS heads each. (NAT-Tiny, 7x7, 4 teams, 2 stages, 2 heads: 6784 +
// 256 + 8 * 21632; 180096 in all.)
#define ROWS_ARE_QUERIES true
#include "common/whole_scores.cuh"
#include "common/whole_team.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"

struct Params {
  Sizes sizes;
  Layout q, k, v, rpb, out, lse;
};

using QueryRows = TeamRows<HEAD_DIM>;
using ValueRows = TeamRows<HEAD_DIM_V>;

constexpr int K_AT = 0, V_AT = ROWS * QueryRows::PITCH, Q_AT = V_AT + ROWS * ValueRows::PITCH;
constexpr int SLOT = (Q_AT + ROWS * QueryRows::PITCH + 127) / 128 * 128;
constexpr int SCORES = (sizeof(Scores) + 127) / 128 * 128, BIAS_AT = AT_ONCE * STAGES * 16;  // its barrier
constexpr int BARRIERS = (BIAS_AT + 8 + 127) / 128 * 128;
constexpr int BIAS_SHARES = SPLIT * (AT_ONCE == 1 ? 1 : AT_ONCE - 1);  // the last team has to start copies

static_assert(FULL, "all queries see all keys");
static_assert(SPLIT == 1 || (SPLIT == 2 && PAIRS > 2), "a part has two pairs of tiles of queries");
static_assert(HEAD_DIM <= 32 && HEAD_DIM_V <= 32, "keys of a map are in registers");

// Two tiles of queries, the rows of an mma: S and then P; the greatest score and the sum of each row. Of an odd number
// of tiles, the last one is there twice.
struct Queries {
  float s[TILES][4];
  float top[2], sum[2];
  int tile[2];

  // S = Q K^T + bias.
  __device__ __forceinline__ void score(const Scores& scores, int head, const unsigned (&keys)[TILES][4],
                                        unsigned queries, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const unsigned word = scores.word(tile[h], lane);
#pragma unroll
      for (int j = 0; j < TILES; ++j) {
        const float2 start = scores.start(head, tile[h], j, word, 1.f, lane);
        s[j][2 * h] = start.x, s[j][2 * h + 1] = start.y;
      }
    }
#pragma unroll
    for (int c = 0; c < (D_CHUNKS + 1) / 2; ++c) {
      unsigned query[4];
      load_rows<QueryRows>(query, queries, tile[0], tile[1], c, lane);
#pragma unroll
      for (int j = 0; j < TILES; ++j) {
        const unsigned(&key)[4] = keys[j];
        if (2 * c + 1 < D_CHUNKS) {
          Mma<Element>::m16n8k16(s[j], query[0], query[1], query[2], query[3], key[2 * c], key[2 * c + 1], s[j]);
        } else {
          Mma<Element>::m16n8k8(s[j], query[0], query[1], key[2 * c], s[j]);
        }
      }
    }
  }

  // Scores become exp2(unit (s - top)).
  __device__ __forceinline__ void soften(float unit) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (h == 1 && tile[0] == tile[1]) {
        top[1] = top[0], sum[1] = sum[0];
#pragma unroll
        for (int j = 0; j < TILES; ++j) s[j][2] = s[j][0], s[j][3] = s[j][1];
        continue;
      }
      float its_top = -1e30f;  // finite: rows that the map lacks see no key
#pragma unroll
      for (int j = 0; j < TILES; ++j) its_top = fmaxf(its_top, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
      its_top = fmaxf(its_top, __shfl_xor_sync(~0u, its_top, 1));
      top[h] = its_top = fmaxf(its_top, __shfl_xor_sync(~0u, its_top, 2));
      const float shift = its_top * unit;
      float of_pair[2] = {0.f, 0.f};
#pragma unroll
      for (int j = 0; j < TILES; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& p = s[j][2 * h + e];
          p = ex2_approx(__fmaf_rn(p, unit, -shift));
          of_pair[e] += p;
        }
      }
      float both = of_pair[0] + of_pair[1];
      both += __shfl_xor_sync(~0u, both, 1);
      sum[h] = both + __shfl_xor_sync(~0u, both, 2);
    }
  }

  // o += P V of key tiles j and, if there is one, j + 1.
  __device__ __forceinline__ void weigh(float (&o)[V_CHUNKS][4], const unsigned (&values)[4][2], int j) const {
    unsigned p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* its = s[j + i / 2 < TILES ? j + i / 2 : j] + i % 2 * 2;
      p[i] = pack<Element>(its[0], its[1]);
    }
#pragma unroll
    for (int i = 0; i < V_CHUNKS; ++i) {
      if (j + 1 < TILES) {
        Mma<Element>::m16n8k16(o[i], p[0], p[1], p[2], p[3], values[i][0], values[i][1], o[i]);
      } else {
        Mma<Element>::m16n8k8(o[i], p[0], p[1], values[i][0], o[i]);
      }
    }
  }

  // O / sum, to `out`, where the lane's token of the first tile is. Neighbouring lanes swap a pair, so that each has 8
  // bytes of one of two chunks, and four of them all of both. (Not through shared memory: what is loaded next would
  // have to wait for stores that might be to the same place.)
  __device__ __forceinline__ void store(Element* out, const Layout& s, const float (&o)[V_CHUNKS][4],
                                        const Share& share, int lane) const {
    const int odd = lane % 2, column = lane % 4 - odd;
#pragma unroll
    for (int h = 0; h < (tile[0] == tile[1] ? 1 : 2); ++h) {
      const float inverse = rcp_approx(sum[h]);
      const bool has = share.has(tile[h], lane / 4);
      Element* its = out + s.of_tile(tile[h]);
#pragma unroll
      for (int i = 0; i < V_CHUNKS; i += 2) {
        const unsigned first = pack<Element>(o[i][2 * h] * inverse, o[i][2 * h + 1] * inverse);
        if (i + 1 < V_CHUNKS) {
          const unsigned second = pack<Element>(o[i + 1][2 * h] * inverse, o[i + 1][2 * h + 1] * inverse);
          const unsigned other = __shfl_xor_sync(~0u, odd ? first : second, 1);
          if (has)
            *reinterpret_cast<uint2*>(its + (i + odd) * 8 + column * 2) =
                make_uint2(odd ? other : first, odd ? second : other);
        } else if (has) {
          *reinterpret_cast<unsigned*>(its + i * 8 + lane % 4 * 2) = first;
        }
      }
    }
  }
};

// A part's queries of a head times a number: a scale that is not to be in the softmax's unit.
__device__ __forceinline__ void scale_queries(unsigned char* queries, int part, float factor, int lane) {
  constexpr int OF_PART = SPLIT == 1 ? ROWS : 4 * TILE_ROWS;
  const int end = smaller(part * OF_PART + OF_PART, ROWS) * D_CHUNKS;
  for (int i = part * OF_PART * D_CHUNKS + lane; i < end; i += 32) {
    unsigned* its = reinterpret_cast<unsigned*>(queries + i / D_CHUNKS * QueryRows::PITCH + i % D_CHUNKS * 16);
    unsigned pairs[4] = {its[0], its[1], its[2], its[3]};
    scale_pairs(pairs, factor);
#pragma unroll
    for (int n = 0; n < 4; ++n) its[n] = pairs[n];
  }
  __syncwarp();
}

// What teams copy, and where to.
struct Copies {
  const Element *q, *k, *v;
  const Params& params;
  const Share& share;
  int head, head_kv;  // the first of a team
  unsigned barriers, slots;

  // Of queries and keys, or of values.
  __device__ __forceinline__ unsigned barrier(int team, int slot, bool values) const {
    return barriers + (team * STAGES + slot) * 16 + (values ? 8 : 0);
  }
  __device__ __forceinline__ unsigned slot_of(int team, int slot) const {
    return slots + (team * STAGES + slot) * SLOT;
  }
  // Starts a thread's share of those for teams first ... end - 1, and each one's batch entry in turn.
  __device__ __forceinline__ void start(int first, int end, int entry, int slot, int thread) const {
#pragma unroll 1
    for (int team = first; team < end && entry < params.sizes.batch; ++team, ++entry) {
      const unsigned to = slot_of(team, slot);
      copy_rows<HEAD_DIM>(to + Q_AT, share.base(q, params.q, head, entry), params.q, share, thread);
      copy_rows<HEAD_DIM>(to + K_AT, share.base(k, params.k, head_kv, entry), params.k, share, thread);
      cp_async_arrive(barrier(team, slot, false));
      copy_rows<HEAD_DIM_V>(to + V_AT, share.base(v, params.v, head_kv, entry), params.v, share, thread);
      cp_async_arrive(barrier(team, slot, true));
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    whole_forward(const Element* __restrict__ q, const Element* __restrict__ k, const Element* __restrict__ v,
                  const BiasElement* __restrict__ rpb, Element* __restrict__ out, float* __restrict__ lse, float scale,
                  const __grid_constant__ Params params) {
  extern __shared__ __align__(128) unsigned char shared[];
  Scores& scores = *reinterpret_cast<Scores*>(shared);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), its_lane = threadIdx.x % 32;
  const int team = warp / (HEADS * SPLIT), member = warp % HEADS, part = warp / HEADS % SPLIT;
  const Share share(params.sizes, warp);
  const ScaleParts parts(scale);
  const int head = share.head, head_kv = HEADS == 1 ? head / params.sizes.heads_per_kv : head;
  unsigned char* slots = shared + SCORES + BARRIERS + team * STAGES * SLOT + member * HEAD_DIM * 2;  // the head's own
  const int step = params.sizes.slices * AT_ONCE, first = share.slice * AT_ONCE;
  const unsigned barriers = shared_address(shared) + SCORES;
  const Copies copies{q, k, v, params, share, head - member, head_kv - member, barriers, barriers + BARRIERS};
  if (threadIdx.x < 2 * AT_ONCE * STAGES) mbarrier_init(barriers + threadIdx.x * 8, TEAM);
  if (threadIdx.x == 0) mbarrier_init(barriers + BIAS_AT, BIAS_SHARES * HEADS * 32);
  __syncthreads();
  if (team == AT_ONCE - 1) {
#pragma unroll 1
    for (int slot = 0; slot < STAGES; ++slot)
      copies.start(0, AT_ONCE, first + slot * step, slot, threadIdx.x % TEAM);
  }
  if (AT_ONCE == 1 || team < AT_ONCE - 1) {
    const BiasShare<BIAS_SHARES> bias(rpb + static_cast<long long>(head) * params.rpb.head, params.rpb, warp,
                                      its_lane);
    scores.fill(bias, parts.bias, share, warp, its_lane);
    mbarrier_arrive(barriers + BIAS_AT);
  }
#pragma unroll 1
  for (int slot = part; slot < STAGES; slot += SPLIT) {  // a slot by one of the map's warps
    clear_missing<HEAD_DIM>(slots + slot * SLOT + K_AT, share, its_lane);
    clear_missing<HEAD_DIM_V>(slots + slot * SLOT + V_AT + member * (HEAD_DIM_V - HEAD_DIM) * 2, share, its_lane);
    clear_missing<HEAD_DIM>(slots + slot * SLOT + Q_AT, share, its_lane);
  }
  if (SPLIT == 1) {
    __syncwarp();
  } else {
    team_sync(team);
  }
  mbarrier_wait(barriers + BIAS_AT, 0);

  int slot = 0;
  unsigned parity = 0;
#pragma unroll 1
  for (int entry = first + team; entry < params.sizes.batch; entry += step) {
    mbarrier_wait(copies.barrier(team, slot, false), parity);
    const unsigned at = shared_address(slots) + slot * SLOT, keys = at + K_AT, queries = at + Q_AT;
    const unsigned values = at + V_AT + member * (HEAD_DIM_V - HEAD_DIM) * 2;
    const int lane = anew_lane(its_lane);  // what depends on it is not worth a register from map to map
    if (parts.query != 1.f) scale_queries(slots + slot * SLOT + Q_AT, part, parts.query, lane);
    Element* to = share.base(out, params.out, head, entry) + params.out.of_token(lane / 4);
    float* rows = share.base(lse, params.lse, head, entry) + params.lse.of_token(lane / 4);
#pragma unroll
    for (int n = 0; n < TILES; n += 4) {
      if (SPLIT > 1 && n / 4 != part) continue;
      constexpr int MOST = PAIRS < 2 ? 1 : 2;
      const int count = n + 2 < TILES ? 2 : 1;  // pairs of tiles, side by side: neither waits for the other's results
      Queries x[MOST];
      {
        unsigned key[TILES][4];
#pragma unroll
        for (int j = 0; j < TILES; ++j) load_columns<QueryRows>(key[j], keys, j, 0, lane);
#pragma unroll
        for (int m = 0; m < count; ++m) {
          x[m].tile[0] = n + 2 * m, x[m].tile[1] = smaller(n + 2 * m + 1, TILES - 1);
          x[m].score(scores, member, key, queries, lane);
        }
      }
      float its_lse;  // of the lane's row of tile n + lane % 4
#pragma unroll
      for (int m = 0; m < count; ++m) {
        x[m].soften(parts.unit);
        const float top = lane % 2 == 0 ? x[m].top[0] : x[m].top[1], sum = lane % 2 == 0 ? x[m].sum[0] : x[m].sum[1];
        const float found = (top * parts.unit + lg2_approx(sum)) * LN_2;
        its_lse = m == 0 || lane % 4 / 2 == 1 ? found : its_lse;
      }
      if (lse != nullptr && n + lane % 4 < TILES && share.has(n + lane % 4, lane / 4))
        rows[params.lse.of_tile(n + lane % 4)] = its_lse;
      if (SPLIT > 1 || n == 0) mbarrier_wait(copies.barrier(team, slot, true), parity);
      float o[MOST][V_CHUNKS][4] = {};
#pragma unroll
      for (int j = 0; j < TILES; j += 2) {
        unsigned value[4][2];
        load_tokens<ValueRows>(value, values, j, 0, lane);
#pragma unroll
        for (int m = 0; m < count; ++m) x[m].weigh(o[m], value, j);
      }
#pragma unroll
      for (int m = 0; m < count; ++m) x[m].store(to, params.out, o[m], share, lane);
      __syncwarp();  // the compiler would begin with the next ones before it has registers for them
    }
    if (entry + STAGES * step < params.sizes.batch) {
      team_sync(team);
      copies.start(team, team + 1, entry + STAGES * step, slot, anew(threadIdx.x % TEAM));
    }
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
  cp_async_wait_all();  // those for other teams, too
}
