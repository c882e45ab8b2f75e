// Stands in for natcore/cuda_src/ptx/cp_async.cuh where whole blocks run on the host: see ../fibers.h for when copies
// land.
#pragma once

#include "warp.h"

inline void cp_async_16(unsigned shared, const void* global, bool present) {
  host::memory_at(shared, 16, "cp.async");
  host::check_source(global, 16, present);
  host::issue({host::Copy::BYTES, shared, present ? global : nullptr});
}
inline void cp_async_16_of_line(unsigned shared, const void* global) { cp_async_16(shared, global, true); }

template <int BYTES>
inline void cp_async_small(unsigned shared, const void* global, bool present) {
  host::memory_at(shared, BYTES, "cp.async");
  host::check_source(global, BYTES, present);
  host::issue({host::Copy::BYTES, shared, present ? global : nullptr, BYTES});
}

inline void cp_async_commit() { host::issue({host::Copy::COMMIT, 0, nullptr}); }

template <int PENDING>
inline void cp_async_wait() {
  std::deque<host::Copy>& mine = host::copies[host::current];
  int groups = 0;
  for (const host::Copy& copy : mine) groups += copy.kind == host::Copy::COMMIT;
  while (groups > PENDING) {
    groups -= mine.front().kind == host::Copy::COMMIT;
    host::land(host::current);
  }
}

inline void cp_async_wait_all() {
  while (!host::copies[host::current].empty()) host::land(host::current);
}

inline void cp_async_arrive(unsigned barrier) {
  host::mbarrier_at(barrier);
  host::issue({host::Copy::ARRIVE, barrier, nullptr});
  host::maybe_give_way();
}
