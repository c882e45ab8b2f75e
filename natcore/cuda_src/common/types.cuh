// Element types, named as natcore names dtypes, and the type of all arithmetic on them.
#pragma once

#include "ptx/convert.cuh"

typedef float float32;
typedef double float64;
struct float16 {
  unsigned short bits;
};
struct bfloat16 {
  unsigned short bits;
};

template <typename Element>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<float64> {
  using type = double;
};

__device__ __forceinline__ float64 widen(float64 x) { return x; }
__device__ __forceinline__ float32 widen(float32 x) { return x; }
__device__ __forceinline__ float32 widen(float16 x) { return f16_to_f32(x.bits); }
__device__ __forceinline__ float32 widen(bfloat16 x) { return bf16_to_f32(x.bits); }

template <typename Element, typename Acc>
__device__ __forceinline__ Element narrow(Acc x) {
  return static_cast<Element>(x);
}
template <>
__device__ __forceinline__ float16 narrow<float16, float>(float x) {
  return {f32_to_f16(x)};
}
template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16, float>(float x) {
  return {f32_to_bf16(x)};
}

// Pairs of 16-bit elements in one register, the first in its lower half.
template <typename Element>
__device__ __forceinline__ unsigned pack(float low, float high);
template <>
__device__ __forceinline__ unsigned pack<float16>(float low, float high) {
  return pack_f16(low, high);
}
template <>
__device__ __forceinline__ unsigned pack<bfloat16>(float low, float high) {
  return pack_bf16(low, high);
}

template <typename Element>
__device__ __forceinline__ float low(unsigned pair) {
  return widen(Element{static_cast<unsigned short>(pair)});
}
template <typename Element>
__device__ __forceinline__ float high(unsigned pair) {
  return widen(Element{static_cast<unsigned short>(pair >> 16)});
}
