// D = A B + C on a warp's tensor cores: 16-bit or TF32 A and B, float32 C and D, for sm_80 and later.
//
// With g = lane / 4 and t = lane % 4, a lane holds
//   A, 16 x K:  a[0] (g, 2t..)  a[1] (g + 8, 2t..)  a[2] (g, 2t + 8..)  a[3] (g + 8, 2t + 8..)
//   B, K x 8:   b[0] (2t.., g)  b[1] (2t + 8.., g)
//   C, 16 x 8:  c[0] (g, 2t)  c[1] (g, 2t + 1)  c[2] (g + 8, 2t)  c[3] (g + 8, 2t + 1)
// where "2t.." is the pair 2t, 2t + 1 in one register. With K = 8 the second halves are missing.
// So A comes from rows by ldmatrix, B from rows of its transpose by ldmatrix, and the registers of a
// C tile, packed to 16 bits, are those of A: softmax(S) V needs no shuffle between its two products.
//
// Element is float16 or bfloat16 of common/types.cuh. Of TF32, K = 8, a lane holds
//   A:  a[0] (g, t)  a[1] (g + 8, t)  a[2] (g, t + 4)  a[3] (g + 8, t + 4)
//   B:  b0 (t, g)  b1 (t + 4, g)
// so ldmatrix fits there too, a register for each pair of 16-bit elements, and the registers of a C tile are those of A
// for an order of the K in which column 2 t is number t, and column 2 t + 1 number t + 4.
#pragma once

#include "common/types.cuh"

template <typename Element>
struct Mma;

#define NATCORE_MMA(ELEMENT_TYPE, NAME)                                                                            \
  template <>                                                                                                      \
  struct Mma<ELEMENT_TYPE> {                                                                                       \
    static __device__ __forceinline__ void m16n8k16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2,          \
                                                    unsigned a3, unsigned b0, unsigned b1, const float (&c)[4]) {  \
      asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                                   \
          ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                               \
          : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                         \
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));     \
    }                                                                                                              \
    static __device__ __forceinline__ void m16n8k8(float (&d)[4], unsigned a0, unsigned a1, unsigned b0,           \
                                                   const float (&c)[4]) {                                          \
      asm("mma.sync.aligned.m16n8k8.row.col.f32." NAME "." NAME                                                    \
          ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"                                              \
          : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                         \
          : "r"(a0), "r"(a1), "r"(b0), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));                                \
    }                                                                                                              \
  };
NATCORE_MMA(float16, "f16")
NATCORE_MMA(bfloat16, "bf16")
#undef NATCORE_MMA

// A and B are float32; all but their sign, exponent and first 10 bits of mantissa is ignored.
__device__ __forceinline__ void mma_tf32_m16n8k8(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                                 const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
