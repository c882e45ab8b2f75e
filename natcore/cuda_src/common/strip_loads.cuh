// The producer warps of a marching block: rows of seen and own tokens into their rings.
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
    const Element* row = tensor + static_cast<long long>(y) * s.step[0];
#pragma unroll(WIDTH > 0 ? 16 : 8)
    for (int c = 0; c < COUNT; c += AT_ONCE) {
      const int x = first + c + column;
      const bool inside = c + AT_ONCE <= WIDTH || static_cast<unsigned>(x) < static_cast<unsigned>(length);
      const Element* from = row + static_cast<long long>(inside ? x : 0) * s.step[1];
#pragma unroll
      for (int p = 0; p < PARTS; ++p)
        if (active[p] && (c + AT_ONCE <= COUNT || c + column < COUNT))
          cp_async_16(shared + Rows::at(target[p] + c * Rows::TOKEN, y), from + source[p], inside);
    }
  }
};

// Where consumers and producers wait for each other before the first copy.
__device__ __forceinline__ void all_are_prepared() { named_barrier_sync(2, THREADS); }

// Zeros: COUNT stretches of BYTES, PITCH apart. All consumers of the block.
template <int BYTES, int COUNT = 1, int PITCH = BYTES>
__device__ __forceinline__ void clear(unsigned char* first) {
  constexpr int CHUNKS = BYTES / 16;
  for (int i = threadIdx.x; i < COUNT * CHUNKS; i += 32 * CONSUMERS)
    *reinterpret_cast<uint4*>(first + i / CHUNKS * PITCH + i % CHUNKS * 16) = uint4{0, 0, 0, 0};
}
template <typename Rows>
__device__ __forceinline__ void clear_gaps(unsigned char* rows) {
  clear<Rows::PITCH - Rows::BYTES, SEEN_ROWS, Rows::PITCH>(rows + Rows::BYTES);
}

// All barriers, by one thread: addresses that differ between lanes would be taken one after the other.
__device__ __forceinline__ void make_barriers(const Barriers& barriers) {
#pragma unroll
  for (int i = 0; i < RING; ++i) {
    mbarrier_init(barriers.full(i), 32 * PRODUCERS);
    mbarrier_init(barriers.empty(i), CONSUMERS);
  }
#pragma unroll
  for (int i = 0; i < OWN_RING; ++i) {
    mbarrier_init(barriers.own_full(i), 32 * PRODUCERS);
    mbarrier_init(barriers.own_empty(i), CONSUMERS);
  }
}

// What the consumers do before anything is copied: zeros where products read what no copy ever writes, which are halves
// of 16-element steps, gaps between rows, and rows below the map. Meanwhile the producers make the barriers and find
// out what to copy.
__device__ __forceinline__ void prepare_shared(unsigned char* shared, const Sizes& sizes) {
  // Rows of queries below the map are never copied, but drpb adds up 0 times what they hold.
  const bool all = PASS == QUERIES && (DILATION_0 > 1 || sizes.extent[0] % BAND != 0);
  if (HEAD_DIM % 16 != 0) clear<SEEN_V_AT - SEEN_D_AT>(shared + SEEN_D_AT);
  if (HEAD_DIM_V % 16 != 0) clear<OWN_D_AT - SEEN_V_AT>(shared + SEEN_V_AT);
  if (HEAD_DIM % 16 != 0 || all) clear<OWN_V_AT - OWN_D_AT>(shared + OWN_D_AT);
  if (HEAD_DIM_V % 16 != 0 || all) clear<OUT_AT - OWN_V_AT>(shared + OWN_V_AT);
  if constexpr (MARGIN > 0) {
    clear<GAP>(shared);
    clear_gaps<SeenD>(shared + SEEN_D_AT);
    clear_gaps<SeenV>(shared + SEEN_V_AT);
  }
  all_are_prepared();
}

// A tensor with a vector for every token. `ratio`: heads of the block's kind that share one of its heads.
struct Source {
  const Element* tensor;
  const Layout& layout;
  int ratio;
};

// {lse, d_lse - delta} of seen queries, written by the backward of queries: [batch, heads, x0, x1] float2.
__device__ __forceinline__ long long scalars_at(const Sizes& sizes, const Run& run, int head) {
  const long long map = static_cast<long long>(run.batch) * (sizes.head_groups * HEADS) + head;
  return (map * sizes.extent[0] + run.group[0]) * sizes.extent[1] + run.group[1];
}

// Row y of the scalars of the block's heads, COLUMNS of each.
__device__ __forceinline__ void copy_scalars(unsigned shared, const float2* scalars, const Sizes& sizes, const Run& run,
                                             int first_head, int y, int lane) {
#pragma unroll 1
  for (int head = 0; head < HEADS; ++head) {
    const float2* row = scalars + scalars_at(sizes, run, first_head + head) +
                        static_cast<long long>(y) * DILATION_0 * sizes.extent[1];
#pragma unroll 4
    for (int c = lane; c < COLUMNS; c += 32) {
      const int x = run.origin() + c;
      const bool inside = 0 <= x && x < run.length[1];
      cp_async_small<8>(shared + (head * COLUMNS + c) * 8, row + (inside ? x * DILATION_1 : 0), inside);
    }
  }
}

// Row y of lse or d_lse of the block's heads, STRIP columns of each.
__device__ __forceinline__ void copy_own_scalars(unsigned shared, const float* tensor, const Layout& s, const Run& run,
                                                 int first_head, int y, int lane) {
  const float* row = tensor + static_cast<long long>(y) * s.step[0];
#pragma unroll 4
  for (int i = lane; i < HEADS * STRIP; i += 32) {
    const int head = i / STRIP, x = run.start + i % STRIP;
    const bool inside = x < run.length[1];
    const int offset = inside ? (first_head + head) * s.head + x * s.step[1] : 0;
    cp_async_small<4>(shared + i * 4, row + offset, inside);
  }
}

// What the producers bring. Of the forward, own tokens have only d, and there are no scalars.
struct Sources {
  Source seen_d, seen_v, own_d, own_v, own_o;
  const float2* scalars;     // KEYS
  const float *lse, *d_lse;  // QUERIES; d_lse may be null
  const Layout &of_lse, &of_d_lse;
};

// All that producer `warp` of a block does: items [begin, end) of the heads from first_head on. Copies of rows are
// numbered, and producers take turns.
__device__ __forceinline__ void produce(unsigned shared, const Barriers& barriers, const Sources& from,
                                        const Sizes& sizes, int first_head, int begin, int end, int warp, int lane) {
  const RowCopy<HEAD_DIM, SeenD> copy_seen_d(from.seen_d.layout, first_head, from.seen_d.ratio, lane);
  const RowCopy<HEAD_DIM_V, SeenV> copy_seen_v(from.seen_v.layout, first_head, from.seen_v.ratio, lane);
  const RowCopy<HEAD_DIM, OwnD> copy_own_d(from.own_d.layout, first_head, from.own_d.ratio, lane);
  const RowCopy<HEAD_DIM_V, OwnV> copy_own_v(from.own_v.layout, first_head, from.own_v.ratio, lane);
  const RowCopy<HEAD_DIM_V, OwnV> copy_own_o(from.own_o.layout, first_head, from.own_o.ratio, lane);
  Turn<RING> stage;
  Turn<OWN_RING> band_turn;
  if (warp == 0 && lane == 0) make_barriers(barriers);
  all_are_prepared();
#pragma unroll 1
  for (int item = begin; item < end;) {
    const Run run(sizes, item, end);
    item = run.next;
    if (run.last < run.first) continue;
    const int length = run.length[1];
    const auto base_of = [&](const Source& source) { return run.base(source.tensor, source.layout, 0); };
    const Element *seen_d = base_of(from.seen_d), *seen_v = base_of(from.seen_v);
    const Element *own_d = base_of(from.own_d), *own_v = base_of(from.own_v), *own_o = base_of(from.own_o);
    const float *lse = nullptr, *d_lse = nullptr;
    if (PASS == QUERIES) lse = run.base(from.lse, from.of_lse, 0);
    if (PASS == QUERIES && from.d_lse != nullptr) d_lse = run.base(from.d_lse, from.of_d_lse, 0);
    int s = stage_of(run.rows_of(run.first).start);
#pragma unroll 1
    for (int band = run.first; band <= run.last; ++band) {
      const int until = stage_of(run.rows_of(band).end - 1);
#pragma unroll 1
      for (; s <= until; ++s) {
        mbarrier_wait(barriers.empty(stage.slot), stage.phase ^ 1);
#pragma unroll
        for (int r = 0; r < BAND; ++r) {
          const int y = s * BAND - SHIFT + r, at = stage.slot * BAND + r, kinds = OWN_KEYS ? 3 : 2;
          if (y < 0 || y >= run.length[0]) continue;
          if (r * kinds % PRODUCERS == warp)
            copy_seen_d.copy<SeenD::COPIED>(shared + SEEN_D_AT + at * SeenD::PITCH, seen_d, from.seen_d.layout, y,
                                      run.origin(), length);
          if ((r * kinds + 1) % PRODUCERS == warp)
            copy_seen_v.copy<SeenV::COPIED>(shared + SEEN_V_AT + at * SeenV::PITCH, seen_v, from.seen_v.layout, y,
                                      run.origin(), length);
          if (OWN_KEYS && (r * kinds + 2) % PRODUCERS == warp)
            copy_scalars(shared + SCALARS_AT + at * SCALARS_ROW, from.scalars, sizes, run, first_head, y, lane);
        }
        cp_async_arrive(barriers.full(stage.slot));
        stage.advance();
      }
      mbarrier_wait(barriers.own_empty(band_turn.slot), band_turn.phase ^ 1);
#pragma unroll
      for (int r = 0; r < BAND; ++r) {
        const int y = band * BAND + r, at = band_turn.slot * BAND + r, kinds = PASS == FORWARD ? 1 : OWN_KEYS ? 2 : 5;
        if (y >= run.length[0]) continue;
        if (r * kinds % PRODUCERS == warp)
          copy_own_d.copy<STRIP>(shared + OWN_D_AT + at * OwnD::PITCH, own_d, from.own_d.layout, y, run.start, length);
        if (PASS != FORWARD && (r * kinds + 1) % PRODUCERS == warp)
          copy_own_v.copy<STRIP>(shared + OWN_V_AT + at * OwnV::PITCH, own_v, from.own_v.layout, y, run.start, length);
        if (PASS != QUERIES) continue;
        if ((r * kinds + 2) % PRODUCERS == warp)
          copy_own_o.copy<STRIP>(shared + OWN_O_AT + at * OwnV::PITCH, own_o, from.own_o.layout, y, run.start, length);
        if ((r * kinds + 3) % PRODUCERS == warp)
          copy_own_scalars(shared + SCALARS_AT + at * SCALARS_ROW, lse, from.of_lse, run, first_head, y, lane);
        if (d_lse != nullptr && (r * kinds + 4) % PRODUCERS == warp)
          copy_own_scalars(shared + SCALARS_AT + (OWN_RING * BAND + at) * SCALARS_ROW, d_lse, from.of_d_lse, run,
                           first_head, y, lane);
      }
      cp_async_arrive(barriers.own_full(band_turn.slot));
      band_turn.advance();
    }
  }
}
