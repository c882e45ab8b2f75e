// Copies from global to shared memory that bypass registers (sm_80 and later).
#pragma once

// 16 bytes; both addresses 16-byte aligned. Where not `present`, zeros are written and nothing is read
// (the global address must still be a valid one). Caches in L2 only.
__device__ __forceinline__ void cp_async_16(unsigned shared, const void* global, bool present) {
  const int bytes = present ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

// As `cp_async_16`, of a line of 128 bytes, the rest of which others will soon ask for: L2 fetches all of it.
__device__ __forceinline__ void cp_async_16_of_line(unsigned shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// As `cp_async_16`, BYTES = 4 or 8 at addresses that are multiples of it.
template <int BYTES>
__device__ __forceinline__ void cp_async_small(unsigned shared, const void* global, bool present) {
  const int bytes = present ? BYTES : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared), "l"(global), "r"(bytes), "n"(BYTES)
               : "memory");
}

// Closes the group of this thread's copies since the last commit.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's latest groups are still under way.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Waits until all of this thread's copies have landed, committed or not.
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Arrives on a barrier of shared memory when all of this thread's earlier copies have landed.
__device__ __forceinline__ void cp_async_arrive(unsigned barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
