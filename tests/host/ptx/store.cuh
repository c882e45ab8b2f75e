// ptx/store.cuh on the host.
#pragma once

inline void store_16(void* global, const unsigned (&r)[4]) {
  if (reinterpret_cast<unsigned long long>(global) % 16 != 0) host::fail("a store of 16 bytes at %p", global);
  __builtin_memcpy(global, r, 16);
}
