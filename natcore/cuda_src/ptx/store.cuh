// Stores that the compiler must not take apart.
#pragma once

// 16 bytes of global memory, at a multiple of 16.
__device__ __forceinline__ void store_16(void* global, const unsigned (&r)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
