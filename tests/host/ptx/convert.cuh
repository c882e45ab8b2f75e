// Stands in for natcore/cuda_src/ptx/convert.cuh where kernels are compiled for the host.
#pragma once

inline float f16_to_f32(unsigned short bits) {
  _Float16 value;
  __builtin_memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

inline unsigned short f32_to_f16(float value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  unsigned short bits;
  __builtin_memcpy(&bits, &rounded, 2);
  return bits;
}

inline float bf16_to_f32(unsigned short bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }

inline unsigned short f32_to_bf16(float value) {
  unsigned word;
  __builtin_memcpy(&word, &value, 4);
  return static_cast<unsigned short>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

inline unsigned pack_f16(float low, float high) { return f32_to_f16(low) | static_cast<unsigned>(f32_to_f16(high)) << 16; }
inline unsigned pack_bf16(float low, float high) {
  return f32_to_bf16(low) | static_cast<unsigned>(f32_to_bf16(high)) << 16;
}
