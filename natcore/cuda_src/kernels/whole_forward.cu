// Neighbourhood attention, forward, on tensor cores: maps of at most 64 tokens, 16-bit elements.
//
// All queries see all keys. A warp takes the whole map of a (batch entry, head, dilation group): it copies q, k and v
// to shared memory, takes keys and values into registers, forms S = Q K^T for 16 queries at a time, the softmax of
// whole rows, and O = P V, which goes to 16-byte stores by the place of its queries. Warps of a block share the bias
// and nothing else: after it is there, no warp waits for another one.
//
//   warp 0   | q k v of batch entry b      | S, P, O | ...        slots of shared memory, STAGES a warp: the copies of
//   warp 1   | q k v of batch entry b + 1  | S, P, O | ...        the next maps are under way meanwhile
//   ...
//
//   7 x 7:  keys  0-7  8-15 ... 48-55        tiles are rows of the map (see whole_map.cuh)
//   queries 0-7   bias  bias    bias
//           8-15  bias  bias    bias         S starts from the bias, which depends on the distance of two tiles,
//           ...                              here of two rows
//
// Shared memory, bytes: the bias (struct Scores); then for each warp and stage K, V, Q and, where its rows are
// longer than Q's, O: ROWS (2 D_PITCH + V_PITCH). (NAT-Tiny, 7x7: 6784 for two heads + WARPS * STAGES * 9600; 83584 for
// 8 warps.)
#define ROWS_ARE_QUERIES true
#include "common/whole_scores.cuh"
#include "ptx/math.cuh"
#include "ptx/mma.cuh"

struct Params {
  Sizes sizes;
  Layout q, k, v, rpb, out, lse;
};

constexpr int K_AT = 0, V_AT = ROWS * D_PITCH, Q_AT = V_AT + ROWS * V_PITCH;
constexpr int OUT_AT = V_PITCH > D_PITCH ? Q_AT + ROWS * D_PITCH : Q_AT;  // where it covers no queries to come
constexpr int STAGE = (V_PITCH > D_PITCH ? OUT_AT : V_AT + ROWS * D_PITCH) + ROWS * V_PITCH;
constexpr int SCORES = (sizeof(Scores) + 127) / 128 * 128;

static_assert(FULL, "all queries see all keys");
static_assert(HEAD_DIM <= 32 && HEAD_DIM_V <= 32, "keys and values of a map are in registers");

// Keys and values of a map as B operands, for all its queries.
struct Operands {
  unsigned key[TILES][4], value[PAIRS][4][2];

  __device__ __forceinline__ Operands(unsigned stage, int lane) {
#pragma unroll
    for (int j = 0; j < TILES; ++j) load_columns<HEAD_DIM>(key[j], stage + K_AT, j, 0, lane);
#pragma unroll
    for (int j = 0; j < TILES; j += 2) load_tokens<HEAD_DIM_V>(value[j / 2], stage + V_AT, j, 0, lane);
  }
};

// Two tiles of queries, the rows of an mma: S and then P; the greatest score and the sum of each row. Of an odd number
// of tiles, the last one is there twice.
struct Queries {
  float s[TILES][4];
  float top[2], sum[2];
  int tile[2];

  // S = Q K^T + bias.
  __device__ __forceinline__ void score(const Scores& scores, int head, const Operands& operands, unsigned stage,
                                        float factor, int lane) {
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
      load_rows<HEAD_DIM>(query, stage + Q_AT, tile[0], tile[1], c, lane);
      if (factor != 1.f) scale_pairs(query, factor);
#pragma unroll
      for (int j = 0; j < TILES; ++j) {
        const unsigned(&key)[4] = operands.key[j];
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

  // O = P V / sum, to `out`, mostly the place of the queries.
  __device__ __forceinline__ void weigh(const Operands& operands, unsigned char* out, int lane) const {
    float o[V_CHUNKS][4] = {};
#pragma unroll
    for (int j = 0; j < TILES; j += 2) {
      unsigned p[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* its = s[j + i / 2 < TILES ? j + i / 2 : j] + i % 2 * 2;
        p[i] = pack<Element>(its[0], its[1]);
      }
#pragma unroll
      for (int i = 0; i < V_CHUNKS; ++i) {
        const unsigned(&value)[2] = operands.value[j / 2][i];
        if (j + 1 < TILES) {
          Mma<Element>::m16n8k16(o[i], p[0], p[1], p[2], p[3], value[0], value[1], o[i]);
        } else {
          Mma<Element>::m16n8k8(o[i], p[0], p[1], value[0], o[i]);
        }
      }
    }
    __syncwarp();  // all lanes have read these queries
    if (!writes(lane)) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float inverse = rcp_approx(sum[h]);
#pragma unroll
      for (int i = 0; i < V_CHUNKS; ++i)
        write_pair<HEAD_DIM_V>(out, tile[h], i, o[i][2 * h] * inverse, o[i][2 * h + 1] * inverse, lane);
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
  unsigned char* stages = shared + SCORES + warp * (STAGES * STAGE);
  const Share share(params.sizes, blockIdx.x, warp);
  const ScaleParts parts(scale);
  const int head = share.head, head_kv = head / params.sizes.heads_per_kv;

  const int step = params.sizes.slices * AT_ONCE, first = share.slice * AT_ONCE + warp / HEADS;
  const auto load = [&](int entry, int slot) {
    if (entry < params.sizes.batch) {
      const int lane = anew(its_lane);
      const unsigned stage = shared_address(stages) + slot * STAGE;
      load_map<HEAD_DIM>(stage + Q_AT, share.base(q, params.q, head, entry), params.q, share, lane);
      load_map<HEAD_DIM>(stage + K_AT, share.base(k, params.k, head_kv, entry), params.k, share, lane);
      load_map<HEAD_DIM_V>(stage + V_AT, share.base(v, params.v, head_kv, entry), params.v, share, lane);
    }
    cp_async_commit();
  };
  {
    const BiasShare bias(rpb + static_cast<long long>(head) * params.rpb.head, params.rpb, 1.f / parts.bias, share,
                         warp, its_lane);
#pragma unroll
    for (int slot = 0; slot < STAGES; ++slot) {
      clear_last<HEAD_DIM>(stages + slot * STAGE + K_AT, its_lane);
      clear_last<HEAD_DIM_V>(stages + slot * STAGE + V_AT, its_lane);
      clear_last<HEAD_DIM>(stages + slot * STAGE + Q_AT, its_lane);
    }
    __syncwarp();
#pragma unroll
    for (int slot = 0; slot < STAGES; ++slot) load(first + slot * step, slot);
    scores.fill(bias, share, warp, its_lane);
  }
  __syncthreads();

  int slot = 0;
#pragma unroll 1
  for (int entry = first; entry < params.sizes.batch; entry += step) {
    cp_async_wait<STAGES - 1>();
    __syncwarp();
    unsigned char* stage = stages + slot * STAGE;
    const unsigned at = shared_address(stage);
    const int lane = anew(its_lane);  // what depends on it is not worth a register from map to map
    const Operands operands(at, lane);
#pragma unroll
    for (int n = 0; n < TILES; n += 2) {
      Queries x;
      x.tile[0] = n, x.tile[1] = smaller(n + 1, TILES - 1);
      x.score(scores, warp % HEADS, operands, at, parts.query, lane);
      x.soften(parts.unit);
      x.weigh(operands, stage + OUT_AT, lane);
      const int its = lane % 2 == 0 ? x.tile[0] : x.tile[1];  // lane 4 i + h has row i of half h
      const float top = lane % 2 == 0 ? x.top[0] : x.top[1], sum = lane % 2 == 0 ? x.sum[0] : x.sum[1];
      if (lse != nullptr && lane % 4 < 2 && share.has(its, lane / 4))
        share.base(lse, params.lse, head, entry)[params.lse.of_token(lane / 4) + params.lse.of_tile(its)] =
            (top * parts.unit + lg2_approx(sum)) * LN_2;
    }
    __syncwarp();
    store_map<HEAD_DIM_V>(share.base(out, params.out, head, entry), stage + OUT_AT, params.out, share, lane);
    __syncwarp();
    load(entry + STAGES * step, slot);
    slot = slot + 1 == STAGES ? 0 : slot + 1;
  }
}
