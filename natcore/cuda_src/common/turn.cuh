// A place in a ring of barriers: which one, and the parity of its phase.
#pragma once

template <int COUNT>
struct Turn {
  int slot = 0;
  unsigned phase = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == COUNT) slot = 0, phase ^= 1;
  }
};
