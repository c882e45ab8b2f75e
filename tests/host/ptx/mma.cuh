// Stands in for natcore/cuda_src/ptx/mma.cuh where whole blocks run on the host: that file says which lane holds what.
// Products and their sum are exact but for float64's rounding, then rounded to float32 once.
#pragma once

#include "common/types.cuh"
#include "warp.h"

template <typename Element>
struct Mma {
  static void m16n8k16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1,
                       const float (&c)[4]) {
    multiply<16>("mma.m16n8k16", d, {a0, a1, a2, a3}, {b0, b1}, c);
  }
  static void m16n8k8(float (&d)[4], unsigned a0, unsigned a1, unsigned b0, const float (&c)[4]) {
    multiply<8>("mma.m16n8k8", d, {a0, a1, 0, 0}, {b0, 0}, c);
  }

 private:
  struct A {
    unsigned r[4];
  };
  struct B {
    unsigned r[2];
  };
  struct Operands {
    A a;
    B b;
    float c[4];
  };

  static double element(unsigned pair, int half) { return half == 0 ? low<Element>(pair) : high<Element>(pair); }

  template <int DEPTH>
  static void multiply(const char* operation, float (&d)[4], A a, B b, const float (&c)[4]) {
    Operands mine{a, b, {c[0], c[1], c[2], c[3]}};
    host::together(operation, mine, multiply_all<DEPTH>);
    for (int i = 0; i < 4; ++i) d[i] = mine.c[i];
  }

  template <int DEPTH>
  static void multiply_all(Operands** all) {
    double a[16][DEPTH], b[DEPTH][8], c[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const Operands& of = *all[lane];
      for (int e = 0; e < 2; ++e)
        for (int half = 0; half < DEPTH / 8; ++half) {
          a[g][t + 8 * half + e] = element(of.a.r[2 * half], e);
          a[g + 8][t + 8 * half + e] = element(of.a.r[2 * half + 1], e);
          b[t + 8 * half + e][g] = element(of.b.r[half], e);
        }
      for (int i = 0; i < 4; ++i) c[g + i / 2 * 8][t + i % 2] = of.c[i];
    }
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < DEPTH; ++k)
        for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        all[lane]->c[i] = static_cast<float>(c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
  }
};

// As a tensor core does it, sums are rounded towards zero.
inline void mma_tf32_m16n8k8(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const float (&c)[4]) {
  struct Operands {
    unsigned a[4], b[2];
    float c[4];
  } mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  host::together("mma.tf32.m16n8k8", mine, [](Operands** all) {
    double of_a[16][8], of_b[8][8];
    const auto read = [](unsigned word) { return static_cast<double>(__uint_as_float(word & 0xffffe000u)); };
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) of_a[g + i % 2 * 8][t + i / 2 * 4] = read(all[lane]->a[i]);
      for (int i = 0; i < 2; ++i) of_b[t + i * 4][g] = read(all[lane]->b[i]);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        double sum = all[lane]->c[i];
        for (int k = 0; k < 8; ++k) sum += of_a[lane / 4 + i / 2 * 8][k] * of_b[k][lane % 4 * 2 + i % 2];
        const float nearest = static_cast<float>(sum);
        all[lane]->c[i] = fabs(nearest) > fabs(sum) ? nextafterf(nearest, 0.f) : nearest;
      }
  });
  for (int i = 0; i < 4; ++i) d[i] = mine.c[i];
}
