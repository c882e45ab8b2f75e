// What the compiler is not to keep in registers.
#pragma once

// The same value, which the compiler takes for a new one: what depends on it is computed again where it is needed.
__device__ __forceinline__ int anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
