// Loads from shared memory by its own addresses, as ldmatrix takes them.
#pragma once

// 8 bytes, at a multiple of 8.
__device__ __forceinline__ void load_shared_8(unsigned& first, unsigned& second, unsigned address) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(first), "=r"(second) : "r"(address) : "memory");
}
