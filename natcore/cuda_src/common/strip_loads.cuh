// The producer warps of a marching block: rows of keys, values and queries into their rings.
#pragma once

#include "common/strips.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mbarrier.cuh"

// Rows of one tensor: which 16-byte chunks of a row are this lane's. A row's chunks are numbered chunks of a head
// fastest, then heads of the block, then columns; 32 lanes copy as many whole columns as they can at once.
template <int D, typename Rows>
struct RowCopy {
  static constexpr int CHUNKS = D / 8, OF_TOKEN = HEADS * CHUNKS, HEAD_BYTES = (D + 15) / 16 * 32;
  static constexpr int AT_ONCE = OF_TOKEN < 32 ? 32 / OF_TOKEN : 1, PARTS = (OF_TOKEN + 31) / 32;
  int column, source[PARTS], target[PARTS];
  bool active[PARTS];

  // `ratio`: heads of the block that share a head of this tensor.
  __device__ __forceinline__ RowCopy(const Layout& s, int first_head, int ratio, int lane) {
    column = OF_TOKEN < 32 ? lane / OF_TOKEN : 0;
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
      const int part = OF_TOKEN < 32 ? lane % OF_TOKEN : lane + 32 * p;
      const int head = part / CHUNKS, chunk = part % CHUNKS;
      active[p] = column < AT_ONCE && part < OF_TOKEN;
      source[p] = (first_head + head) / ratio * s.head + chunk * 8;
      target[p] = column * Rows::TOKEN + head * HEAD_BYTES + chunk * 16;
    }
  }

  // COUNT columns of row y, from column `first` of the map on, to `shared`; those outside the map become zeros.
  template <int COUNT>
  __device__ __forceinline__ void copy(unsigned shared, const Element* tensor, const Layout& s, int y, int first,
                                       int length) const {
    const long long x = first + column;
    const Element* from = tensor + (static_cast<long long>(y) * s.step[0] + x * s.step[1]);
#pragma unroll 8
    for (int c = 0; c < COUNT; c += AT_ONCE) {
      const bool inside = static_cast<unsigned>(first + c + column) < static_cast<unsigned>(length);
#pragma unroll
      for (int p = 0; p < PARTS; ++p)
        if (active[p] && (c + AT_ONCE <= COUNT || c + column < COUNT))
          cp_async_16(shared + Rows::at(target[p] + c * Rows::TOKEN, y), from + source[p], inside);
      from += AT_ONCE * s.step[1];
    }
  }
};

// What the copies never write and products read: halves of 16-element steps, and what lies beside rows that are the
// map's. All threads of the block.
template <int D, int TOKEN>
__device__ __forceinline__ void clear_rest(unsigned char* shared, int bytes) {
  if (D % 16 != 0) {
    for (int i = threadIdx.x; i < bytes / 16; i += THREADS) reinterpret_cast<uint4*>(shared)[i] = uint4{0, 0, 0, 0};
  }
}
template <typename Rows>
__device__ __forceinline__ void clear_margins(unsigned char* shared) {  // around the end of each row
  constexpr int BEFORE = Rows::BYTES < margin_of(Rows::TOKEN) ? Rows::BYTES : margin_of(Rows::TOKEN);
  constexpr int CHUNKS = (BEFORE + Rows::PITCH - Rows::BYTES + margin_of(Rows::TOKEN)) / 16;
  for (int i = threadIdx.x; i < (RING * BAND + 1) * CHUNKS; i += THREADS) {
    const int byte = (i / CHUNKS - 1) * Rows::PITCH + (Rows::BYTES - BEFORE) / 16 * 16 + i % CHUNKS * 16;
    if (-margin_of(Rows::TOKEN) <= byte && byte < RING * BAND * Rows::PITCH + margin_of(Rows::TOKEN))
      *reinterpret_cast<uint4*>(shared + byte) = uint4{0, 0, 0, 0};
  }
}

// All that producer `warp` of a block does: items [begin, end) of the heads from first_head on.
__device__ __forceinline__ void produce(unsigned shared, const Barriers& barriers, const Element* q, const Element* k,
                                        const Element* v, const Params& params, int first_head, int begin, int end,
                                        int warp, int lane) {
  const int ratio = params.sizes.heads_per_kv;
  const RowCopy<HEAD_DIM, K> key_copy(params.k, first_head, ratio, lane);
  const RowCopy<HEAD_DIM_V, V> value_copy(params.v, first_head, ratio, lane);
  const RowCopy<HEAD_DIM, QueryRows> query_copy(params.q, first_head, 1, lane);
  Turn<RING> stage;
  Turn<QUERY_RING> band_turn;
#pragma unroll 1
  for (int item = begin; item < end;) {
    const Run run(params.sizes, item, end);
    item = run.next;
    if (run.last < run.first) continue;
    const Element *keys = run.base(k, params.k, 0), *values = run.base(v, params.v, 0);
    const Element* queries = run.base(q, params.q, 0);
    int s = stage_of(run.rows_of(run.first).start);
#pragma unroll 1
    for (int band = run.first; band <= run.last; ++band) {
      const int until = stage_of(run.rows_of(band).end - 1);
#pragma unroll 1
      for (; s <= until; ++s) {
        mbarrier_wait(barriers.empty(stage.slot), stage.phase ^ 1);
#pragma unroll 1
        for (int i = warp; i < 2 * BAND; i += PRODUCERS) {
          const int r = i / 2, y = s * BAND - SHIFT + r, at = stage.slot * BAND + r;
          if (y < 0 || y >= run.length[0]) continue;
          if (i % 2 == 0) {
            key_copy.copy<COLUMNS>(shared + K_AT + at * K::PITCH, keys, params.k, y, run.origin(), run.length[1]);
          } else {
            value_copy.copy<COLUMNS>(shared + V_AT + at * V::PITCH, values, params.v, y, run.origin(), run.length[1]);
          }
        }
        cp_async_arrive(barriers.full(stage.slot));
        stage.advance();
      }
      mbarrier_wait(barriers.queries_empty(band_turn.slot), band_turn.phase ^ 1);
#pragma unroll 1
      for (int r = warp; r < BAND; r += PRODUCERS) {
        const int y = band * BAND + r;
        if (y < run.length[0])
          query_copy.copy<STRIP>(shared + Q_AT + (band_turn.slot * BAND + r) * QueryRows::PITCH, queries, params.q, y,
                                 run.start, run.length[1]);
      }
      cp_async_arrive(barriers.queries_full(band_turn.slot));
      band_turn.advance();
    }
  }
}
