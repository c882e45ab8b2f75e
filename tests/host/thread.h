// Blocks of one thread: no lanes, no barriers to wait at.
#pragma once

#include "shim.h"

inline void __syncthreads() {}

template <typename... Param>
void launch_all(void (*kernel)(Param...), unsigned blocks, void** params) {
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    call(kernel, params, std::make_index_sequence<sizeof...(Param)>());
}
