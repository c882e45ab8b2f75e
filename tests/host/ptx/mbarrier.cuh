// Stands in for natcore/cuda_src/ptx/mbarrier.cuh where whole blocks run on the host.
#pragma once

#include "warp.h"

inline void mbarrier_init(unsigned barrier, unsigned count) {
  if (count == 0 || count > 0xffff) host::fail("an mbarrier of %u arrivals", count);
  const auto arrivals = static_cast<unsigned short>(count);
  const host::MBarrier state{host::MBarrier::MARK, arrivals, arrivals, 0};
  memcpy(host::memory_at(barrier, 8, "mbarrier"), &state, 8);
}

inline void mbarrier_arrive(unsigned barrier) {
  host::arrive(barrier);
  host::maybe_give_way();
}

inline void mbarrier_wait(unsigned barrier, unsigned parity) {
  if (parity > 1) host::fail("mbarrier_wait for parity %u", parity);
  host::wait_for_phase(barrier, parity);
}

inline void named_barrier_sync(int barrier, int threads) {
  if (barrier == 0) host::fail("barrier 0 is that of __syncthreads");
  host::wait_at(barrier, threads);
}
