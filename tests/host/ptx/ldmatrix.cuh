// Stands in for natcore/cuda_src/ptx/ldmatrix.cuh where whole blocks run on the host.
#pragma once

#include "warp.h"

namespace host {

template <int COUNT>
struct Matrices {
  unsigned address;
  unsigned* registers;
};

// Between the 16-bit element of row r, column c of matrix m and its place in a lane's register.
template <int COUNT, bool LOAD, bool TRANSPOSED>
void move_matrices(const char* operation, unsigned address, unsigned* registers) {
  Matrices<COUNT> mine{address, registers};
  together(operation, mine, [operation](Matrices<COUNT>** all) {
    for (int row = 0; row < 8 * COUNT; ++row) {
      auto* memory = reinterpret_cast<unsigned short*>(memory_at(all[row]->address, 16, operation));
      for (int column = 0; column < 8; ++column) {
        const int r = TRANSPOSED ? column : row % 8, c = TRANSPOSED ? row % 8 : column;
        unsigned& pair = all[r * 4 + c / 2]->registers[row / 8];
        const int shift = c % 2 * 16;
        if (LOAD) {
          pair = (pair & ~(0xffffu << shift)) | static_cast<unsigned>(memory[column]) << shift;
        } else {
          memory[column] = static_cast<unsigned short>(pair >> shift);
        }
      }
    }
  });
}

}  // namespace host

inline unsigned shared_address(const void* pointer) { return host::address_of(pointer); }

inline void ldmatrix_x1(unsigned (&r)[1], unsigned address) {
  host::move_matrices<1, true, false>("ldmatrix.x1", address, r);
}
inline void ldmatrix_x2(unsigned (&r)[2], unsigned address) {
  host::move_matrices<2, true, false>("ldmatrix.x2", address, r);
}
inline void ldmatrix_x4(unsigned (&r)[4], unsigned address) {
  host::move_matrices<4, true, false>("ldmatrix.x4", address, r);
}
inline void ldmatrix_x2_transposed(unsigned (&r)[2], unsigned address) {
  host::move_matrices<2, true, true>("ldmatrix.x2.trans", address, r);
}
inline void ldmatrix_x4_transposed(unsigned (&r)[4], unsigned address) {
  host::move_matrices<4, true, true>("ldmatrix.x4.trans", address, r);
}

inline unsigned movmatrix_transposed(unsigned r) {
  struct Operands {
    unsigned pair, result;
  } mine{r, 0};
  host::together("movmatrix", mine, [](Operands** all) {
    for (int row = 0; row < 8; ++row)
      for (int column = 0; column < 8; ++column) {
        const unsigned element = all[column * 4 + row / 2]->pair >> row % 2 * 16 & 0xffffu;
        all[row * 4 + column / 2]->result |= element << column % 2 * 16;
      }
  });
  return mine.result;
}

#if __CUDA_ARCH__ >= 900
inline void stmatrix_x4(unsigned address, const unsigned (&r)[4]) {
  host::move_matrices<4, false, false>("stmatrix.x4", address, const_cast<unsigned*>(r));
}
inline void stmatrix_x2_transposed(unsigned address, const unsigned (&r)[2]) {
  host::move_matrices<2, false, true>("stmatrix.x2.trans", address, const_cast<unsigned*>(r));
}
inline void stmatrix_x4_transposed(unsigned address, const unsigned (&r)[4]) {
  host::move_matrices<4, false, true>("stmatrix.x4.trans", address, const_cast<unsigned*>(r));
}
#endif
