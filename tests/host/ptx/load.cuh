// Stands in for natcore/cuda_src/ptx/load.cuh where whole blocks run on the host.
#pragma once

#include "warp.h"

inline void load_shared_8(unsigned& first, unsigned& second, unsigned address) {
  const unsigned char* from = host::memory_at(address, 8, "ld.shared");
  __builtin_memcpy(&first, from, 4);
  __builtin_memcpy(&second, from + 4, 4);
}
