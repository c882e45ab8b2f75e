// Scalars of queries.
#pragma once

#include "common/rolling.cuh"
#include "ptx/mma.cuh"

// The scalars of a group of a band's queries, of which the map has `rows` rows, from what lies in a slot of the ring:
// `own` and `given`. Tokens that the map lacks get a weight of exp(-inf).
__device__ __forceinline__ void find_scalars(Scalars* scalars, const unsigned char* own, const float* given,
                                             bool with_d_lse, int group, int rows, int columns, int lane) {
  const int at = group * 8 * TOKEN + query_place(lane / 4 % BAND, lane / 4 / BAND, lane % 4);
  const uint4 a = *reinterpret_cast<const uint4*>(own + G_AT - Q_AT + at);
  const uint4 b = *reinterpret_cast<const uint4*>(own + O_AT - Q_AT + at);
  const int token = group * 8 + lane % 8, column = token / BAND;
  const float its_lse = given[token], its_d_lse = with_d_lse ? given[QUERIES + token] : 0.f;
  // Half of delta is on the diagonal of the first 8 rows of one product, half of the last ones of another, in the lanes
  // of which lane % 4 is half of the token.
  const float zeros[4] = {};
  float c[4], d[4];
  Mma<Element>::m16n8k16(c, a.x, a.y, a.z, a.w, b.x, b.z, zeros);
  Mma<Element>::m16n8k16(d, a.x, a.y, a.z, a.w, b.y, b.w, zeros);
  const float half = lane / 4 % 2 == 0 ? c[0] + d[2] : c[1] + d[3];
  const float delta = __shfl_sync(~0u, half, lane % 8 * 4 + lane % 8 / 2);
  // A query's scalars are also its left neighbour's: of 16 lanes each stores one.
  const bool has = token % BAND < rows && column < columns;
  const int neighbour = lane / 8;
  if (lane >= 16 || column < neighbour) return;
  Scalars& its = scalars[token % BAND * (QUERIES / BAND) + column - neighbour];
  its.lse[neighbour] = has ? its_lse * LOG2_E : __int_as_float(0x7f800000);
  its.start[neighbour] = has ? its_d_lse - delta : 0.f;
}
