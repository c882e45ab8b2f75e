// The warp that copies: rows of keys and bands of queries.
#pragma once

#include "common/rolling.cuh"
#include "ptx/cp_async.cuh"

// Where in its maps a block is: a batch entry, and a band of queries or of as many rows of keys.
struct Cursor {
  int entry, band;
  __device__ __forceinline__ void advance(int bands, int slices) {
    if (++band == bands) band = 0, entry += slices;
  }
};

constexpr int LEAST_COLUMNS = DILATION_1 == 1 ? COLUMNS : COLUMNS - 1;  // of a dilation group

// Two rows of keys' tokens of D elements after the other: a lane has chunk lane % 4 of every 8th column, from column
// lane / 4 - SHIFT on, so that 8 lanes write 128 bytes.
template <int D>
struct KeyStream {
  const Element* from;  // of this lane, in the next row

  __device__ __forceinline__ void start(const Element* tensor, const Layout& s, const Share& share, int entry,
                                        int lane) {
    from = share.base(tensor, s, entry) + (lane / CHUNKS - SHIFT) * s.step[1] + lane % CHUNKS * 8;
  }
  // Starts the copies of row i of two to `shared`, this lane's first place.
  __device__ __forceinline__ void copy(unsigned shared, const Layout& s, int i, int length, int lane) const {
    if (lane % CHUNKS >= D / 8) return;
#pragma unroll
    for (int first = 0; first < COLUMNS + SHIFT; first += 8) {
      const int column = lane / CHUNKS + first - SHIFT;
      if ((first > 0 || column >= 0) && (first + 8 - SHIFT <= LEAST_COLUMNS || column < length))
        cp_async_16(shared + first * TOKEN, from + i * s.step[0] + first * s.step[1], true);
    }
  }
  __device__ __forceinline__ void advance(const Layout& s) { from += BAND * s.step[0]; }
};

// Bands of queries' tokens of D elements: a lane has chunk lane % 4 of row lane / 4 % 2 of every 4th column, from
// column lane / 8 on.
template <int D>
struct QueryStream {
  const Element* from;  // of this lane, in the next band

  __device__ __forceinline__ void start(const Element* tensor, const Layout& s, const Share& share, int entry,
                                        int lane) {
    from = share.base(tensor, s, entry) + s.of(lane / CHUNKS % BAND, lane / CHUNKS / BAND) + lane % CHUNKS * 8;
  }
  // Starts the copies to `shared`, this lane's first place; zeros, where its row is not `present`.
  __device__ __forceinline__ void copy(unsigned shared, const Layout& s, int length, bool present, int lane) const {
    if (lane % CHUNKS >= D / 8) return;
    const Element* its = present ? from : from - s.step[0];
#pragma unroll
    for (int column = 0; column < COLUMNS; column += 4)
      if (column + 4 <= LEAST_COLUMNS || lane / CHUNKS / BAND + column < length)
        cp_async_16(shared + column * BAND * TOKEN, its + column * s.step[1], present);
  }
  __device__ __forceinline__ void advance(const Layout& s) { from += BAND * s.step[0]; }
};

// What is copied of keys and values.
struct KeyStreams {
  const Element *k, *v;
  const Layout &of_k, &of_v;
  const Share& share;
  Cursor cursor;
  KeyStream<HEAD_DIM> keys;
  KeyStream<HEAD_DIM_V> values;
  int at, slot;  // of the next row, in the ring and among the slots

  // The next two rows, if there are any.
  __device__ __forceinline__ void load(unsigned base, int bands, const Sizes& sizes, int lane) {
    if (cursor.entry >= sizes.batch) return;
    if (cursor.band == 0) {
      keys.start(k, of_k, share, cursor.entry, lane);
      values.start(v, of_v, share, cursor.entry, lane);
    }
#pragma unroll
    for (int i = 0; i < BAND; ++i) {
      if (i > 0 && cursor.band * BAND + i >= share.length[0]) continue;
      const unsigned to = base + (at + i) * PITCH + key_place(slot + i, lane / CHUNKS - SHIFT, lane % CHUNKS);
      keys.copy(to + K_AT, of_k, i, share.length[1], lane);
      values.copy(to + V_AT, of_v, i, share.length[1], lane);
    }
    keys.advance(of_k);
    values.advance(of_v);
    cursor.advance(bands, sizes.slices);
    at = at + BAND < RING ? at + BAND : 0;
    slot = (slot + BAND) & (BLOCK_ROWS - 1);
  }
};

// What is copied of queries, output gradients, outputs, lse and d_lse. Rows that the map lacks become zeros.
struct QueryStreams {
  const Element *q, *d_out, *out;
  const float *lse, *d_lse;
  const Layout &of_q, &of_d_out, &of_out, &of_lse, &of_d_lse;
  const Share& share;
  Cursor cursor;
  QueryStream<HEAD_DIM> queries;
  QueryStream<HEAD_DIM_V> gradients, outputs;
  int slot;  // of the ring

  // The next band, if there is one.
  __device__ __forceinline__ void load(unsigned base, int bands, const Sizes& sizes, int lane) {
    if (cursor.entry >= sizes.batch) return;
    if (cursor.band == 0) {
      queries.start(q, of_q, share, cursor.entry, lane);
      gradients.start(d_out, of_d_out, share, cursor.entry, lane);
      outputs.start(out, of_out, share, cursor.entry, lane);
    }
    const int row = cursor.band * BAND;
    const bool present = row + lane / CHUNKS % BAND < share.length[0];
    const unsigned to =
        base + slot * OWN + query_place(lane / CHUNKS % BAND, lane / CHUNKS / BAND, lane % CHUNKS);
    queries.copy(to + Q_AT, of_q, share.length[1], present, lane);
    gradients.copy(to + G_AT, of_d_out, share.length[1], present, lane);
    outputs.copy(to + O_AT, of_out, share.length[1], present, lane);
    queries.advance(of_q);
    gradients.advance(of_d_out);
    outputs.advance(of_out);
    const unsigned given = base + GIVEN_AT + slot * GIVEN + lane * 4;
    copy_scalars(given, lse, of_lse, row, lane);
    if (d_lse != nullptr) copy_scalars(given + QUERIES * 4, d_lse, of_d_lse, row, lane);
    cursor.advance(bands, sizes.slices);
    slot = slot + 1 < OWN_RING ? slot + 1 : 0;
  }
  __device__ __forceinline__ void copy_scalars(unsigned to, const float* tensor, const Layout& s, int row,
                                               int lane) const {
    const float* from = share.base(tensor, s, cursor.entry) + s.of(row + lane % BAND, lane / BAND);
#pragma unroll
    for (int column = 0; column < COLUMNS; column += 32 / BAND)
      if (share.has(row + lane % BAND, column + lane / BAND))
        cp_async_small<4>(to + column * BAND * 4, from + column * s.step[1], true);
  }
};

// All that the warp that copies does: bands are AHEAD of the one that others work on, LEAD more of keys' rows. It says
// when those after the next one have come.
__device__ __forceinline__ void bring(KeyStreams keys, QueryStreams queries, const Step& step, unsigned base, int bands,
                                      const Sizes& sizes, int maps, int lane) {
  const auto load_band = [&]() {
    keys.load(base, bands, sizes, lane);
    queries.load(base, bands, sizes, lane);
    cp_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < LEAD; ++i) keys.load(base, bands, sizes, lane);
#pragma unroll 1
  for (int i = 0; i < AHEAD; ++i) load_band();
  cp_async_wait<AHEAD - 2>();
  step.arrive(lane);
  step.wait(0);
  step.arrive(lane);
#pragma unroll 1
  for (int number = 0; number < maps * bands; ++number) {
    step.wait(number + 1);
    load_band();
    cp_async_wait<AHEAD - 2>();
    step.arrive(lane);
  }
}
