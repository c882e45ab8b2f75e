// Enough of CUDA C++ to run a kernel on the host, one thread a block: no lanes, no barriers to wait at.
// KERNEL and KERNEL_FILE name the kernel; `launch` takes its parameters as cuLaunchKernel does.
#pragma once

#include <math.h>

#include <type_traits>
#include <utility>

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __forceinline__ inline

struct Dim {
  unsigned x, y, z;
};
static Dim blockIdx, threadIdx;

inline void __syncthreads() {}

inline float __uint_as_float(unsigned word) {
  float value;
  __builtin_memcpy(&value, &word, 4);
  return value;
}

template <typename... Param, size_t... I>
void call(void (*kernel)(Param...), void** params, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_cv_t<Param>*>(params[I])...);
}

template <typename... Param>
void launch_all(void (*kernel)(Param...), unsigned blocks, void** params) {
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    call(kernel, params, std::make_index_sequence<sizeof...(Param)>());
}

// Writes the size of each parameter and returns their number.
template <typename... Param>
int sizes_of(void (*)(Param...), int* sizes) {
  const int all[] = {static_cast<int>(sizeof(Param))...};
  for (unsigned i = 0; i < sizeof...(Param); ++i) sizes[i] = all[i];
  return sizeof...(Param);
}
