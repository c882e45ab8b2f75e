// Enough of CUDA C++ to compile a kernel for the host. KERNEL and KERNEL_FILE name the kernel, see kernel.cc.
// Shared variables are thread_local, for that may stand beside `extern` and is static without it.
#pragma once

#include <math.h>

#include <type_traits>
#include <utility>

#define __builtin_assume(condition) ((condition) ? void() : __builtin_trap())  // nvrtc's; here it is checked
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))

struct Dim {
  unsigned x, y, z;
};
static Dim blockIdx, threadIdx, gridDim, blockDim;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// The same bits as another type.
template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}
inline float __uint_as_float(unsigned word) { return bits_as<float>(word); }
inline float __int_as_float(int word) { return bits_as<float>(word); }
inline unsigned __float_as_uint(float value) { return bits_as<unsigned>(value); }
inline int __float_as_int(float value) { return bits_as<int>(value); }

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline int __ffs(int word) { return __builtin_ffs(word); }
inline int __clz(int word) { return word == 0 ? 32 : __builtin_clz(static_cast<unsigned>(word)); }

// The threads of a block are fibers (see block.h): nothing comes between these two lines.
template <typename T>
inline T atomicAdd(T* at, std::common_type_t<T> value) {
  const T before = *at;
  *at = before + value;
  return before;
}

template <typename... Param, size_t... I>
void call(void (*kernel)(Param...), void** params, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_cv_t<Param>*>(params[I])...);
}

// Writes the size of each parameter and returns their number.
template <typename... Param>
int sizes_of(void (*)(Param...), int* sizes) {
  const int all[] = {static_cast<int>(sizeof(Param))...};
  for (unsigned i = 0; i < sizeof...(Param); ++i) sizes[i] = all[i];
  return sizeof...(Param);
}
