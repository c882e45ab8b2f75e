// How results of a warp reach global memory.
#pragma once

#include "common/map_share.cuh"

using TokenRows = Rows<TOKEN / 2>;  // of a stage

// Results reach 16-byte stores by a warp's stage of 16 tokens. A lane stores chunk lane % 4 of tokens lane / 4 and
// lane / 4 + 8, the second one so many elements after the first.
struct Stores {
  Element* to;
  int second;
  bool has_first, has_second;

  __device__ __forceinline__ void write(const unsigned char* stage, int lane) const {
    const unsigned char* its = stage + lane / 4 * TOKEN + TokenRows::chunk(lane / 4, lane % 4);
    __syncwarp();
    if (has_first) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(its);
    if (has_second) *reinterpret_cast<uint4*>(to + second) = *reinterpret_cast<const uint4*>(its + 8 * TOKEN);
    __syncwarp();
  }
};

// Four matrices of 8 tokens x 8 elements, as C tiles hold them or their transposes, to 8 tokens of a stage.
template <bool TRANSPOSED>
__device__ __forceinline__ void stage_tokens(unsigned char* stage, const unsigned (&r)[4], int lane) {
#if __CUDA_ARCH__ >= 900
  const unsigned at = shared_address(stage) + lane % 8 * TOKEN + TokenRows::chunk(lane % 8, lane / 8);
  if (TRANSPOSED) {
    stmatrix_x4_transposed(at, r);
  } else {
    stmatrix_x4(at, r);
  }
#else
#pragma unroll
  for (int c = 0; c < 4; ++c)
    *reinterpret_cast<unsigned*>(stage + lane / 4 * TOKEN + TokenRows::chunk(lane / 4, c) + lane % 4 * 4) =
        TRANSPOSED ? movmatrix_transposed(r[c]) : r[c];
#endif
}
