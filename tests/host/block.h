// A block of a launch: its shared memory, asynchronous copies and barriers. Blocks run one after the other.
//
// Shared memory starts as NaN, of floats and of 16-bit elements. Addresses of the shared window are offsets from its
// start plus WINDOW, and every access through one is checked. Whatever is wrong ends the launch with a message.
#pragma once

#include <stddef.h>
#include <string.h>

#include <map>
#include <string>

#include "fibers.h"

#define NATCORE_SHARED_LIMIT (228 << 10)  // bytes of an H200's multiprocessor
#define NATCORE_FENCE 4096                // bytes after a block's own, that nobody may change

alignas(1024) thread_local unsigned char shared[NATCORE_SHARED_LIMIT + NATCORE_FENCE];

namespace host {

constexpr unsigned WINDOW = 4096;
static unsigned shared_bytes;
constexpr unsigned char POISON = 0xff, FENCE = 0xa5;

inline unsigned address_of(const void* pointer) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - ::shared;
  if (offset < 0 || offset > static_cast<ptrdiff_t>(shared_bytes))
    fail("shared_address of a pointer %td bytes from the start of %u bytes of shared memory", offset, shared_bytes);
  return WINDOW + static_cast<unsigned>(offset);
}

// The memory at an address of the shared window; `bytes` of it are used, and it is aligned to as many.
inline unsigned char* memory_at(unsigned address, unsigned bytes, const char* user) {
  const unsigned offset = address - WINDOW;
  if (address % bytes != 0) fail("%s at byte %d of shared memory: not aligned to %u", user, int(offset), bytes);
  if (offset > shared_bytes || shared_bytes - offset < bytes)
    fail("%s at byte %d of %u bytes of shared memory", user, int(offset), shared_bytes);
  return ::shared + offset;
}

// ---- barriers of shared memory: their state lies there ----

struct MBarrier {
  unsigned short mark, pending, count, phase;
  static constexpr unsigned short MARK = 0xba55;
};

inline MBarrier mbarrier_at(unsigned address) {
  MBarrier barrier;
  memcpy(&barrier, memory_at(address, 8, "mbarrier"), 8);
  if (barrier.mark != MBarrier::MARK) fail("no mbarrier at byte %u of shared memory", address - WINDOW);
  return barrier;
}
inline void arrive(unsigned address) {
  MBarrier barrier = mbarrier_at(address);
  if (--barrier.pending == 0) {
    barrier.pending = barrier.count, barrier.phase ^= 1;
    for (size_t i = 0; i < fibers.size(); ++i)
      if (fibers[i].awaits != nullptr && fibers[i].which == address) wake(static_cast<int>(i));
  }
  memcpy(memory_at(address, 8, "mbarrier"), &barrier, 8);
}
inline void wait_for_phase(unsigned address, unsigned parity) {
  while (mbarrier_at(address).phase == parity) wait_for("mbarrier", address, parity);
}

// ---- barriers of the block ----

struct NamedBarrier {
  int arrived, threads;
};
static NamedBarrier named[16];

inline void wait_at(int number, int threads) {
  if (number < 0 || number > 15 || threads <= 0 || threads % 32 != 0 || threads > static_cast<int>(fibers.size()))
    fail("barrier %d of %d threads", number, threads);
  NamedBarrier& barrier = named[number];
  if (barrier.arrived == 0) barrier.threads = threads;
  if (barrier.threads != threads) fail("barrier %d of %d threads, of others %d", number, threads, barrier.threads);
  if (++barrier.arrived < threads) return wait_for("barrier", static_cast<unsigned>(number));
  barrier.arrived = 0;
  for (size_t i = 0; i < fibers.size(); ++i)
    if (fibers[i].awaits != nullptr && fibers[i].which == static_cast<unsigned>(number) &&
        strcmp(fibers[i].awaits, "barrier") == 0)
      wake(static_cast<int>(i));
}

// ---- asynchronous copies ----

// The global memory that they may name, also where they copy nothing; if there is none, any.
struct Memory {
  size_t begin, end;
};
static std::vector<Memory> readable;

inline void check_source(const void* global, unsigned bytes, bool present) {
  const size_t address = reinterpret_cast<size_t>(global);
  if (present && address % bytes != 0) fail("cp.async from %p: not aligned to %u", global, bytes);
  for (const Memory& memory : readable)
    if (memory.begin <= address && address + bytes <= memory.end) return;
  if (!readable.empty()) fail("cp.async from %p: outside of all arrays%s", global, present ? "" : ", though of nothing");
}

struct Copy {
  enum Kind { BYTES, COMMIT, ARRIVE } kind;
  unsigned to;  // or the mbarrier
  const void* from;  // null: zeros
  unsigned bytes = 16;
};
static std::vector<std::deque<Copy>> copies;  // of each thread, in their order
static size_t landing;                        // the thread whose copies land next, where nobody can go on

inline void land(int thread) {
  const Copy copy = copies[thread].front();
  copies[thread].pop_front();
  if (copy.kind == Copy::ARRIVE) arrive(copy.to);
  if (copy.kind != Copy::BYTES) return;
  unsigned char* to = memory_at(copy.to, copy.bytes, "cp.async");
  if (copy.from == nullptr) {
    memset(to, 0, copy.bytes);
  } else {
    memcpy(to, copy.from, copy.bytes);
  }
}
inline void issue(const Copy& copy) {
  copies[current].push_back(copy);
  if (order == EAGER && copy.kind != Copy::COMMIT) {
    while (!copies[current].empty()) land(current);
  }
}
// Lands copies of one thread up to its next arrival on an mbarrier; false where there are none.
inline bool land_some() {
  if (is_random()) landing = random_below(static_cast<unsigned>(copies.size()));
  for (size_t n = 0; n < copies.size(); ++n) {
    const int thread = static_cast<int>((landing + n) % copies.size());
    if (copies[thread].empty()) continue;
    bool arrived = false;
    while (!arrived && !copies[thread].empty()) {
      arrived = copies[thread].front().kind == Copy::ARRIVE;
      land(thread);
    }
    landing = thread + 1;
    return true;
  }
  return false;
}

// ---- the block ----

[[noreturn]] inline void deadlock() {
  std::map<std::string, int> waiting;
  for (const Fiber& fiber : fibers) {
    if (fiber.done) continue;
    char text[160];
    snprintf(text, sizeof text, "%s", fiber.awaits);
    if (strcmp(fiber.awaits, "barrier") == 0) {
      const NamedBarrier& barrier = named[fiber.which];
      snprintf(text, sizeof text, "barrier %u, %d of %d came", fiber.which, barrier.arrived, barrier.threads);
    } else if (strcmp(fiber.awaits, "mbarrier") == 0) {
      const MBarrier barrier = mbarrier_at(fiber.which);
      snprintf(text, sizeof text, "the mbarrier at byte %u, parity %u: %d of %d arrivals are missing",
               fiber.which - WINDOW, fiber.state, barrier.pending, barrier.count);
    }
    ++waiting[text];
  }
  static char all[2048];
  int length = 0;
  for (const auto& [text, count] : waiting) {
    if (length > static_cast<int>(sizeof all) - 256) break;
    length += snprintf(all + length, sizeof all - length, "\n  %d threads wait for %s", count, text.c_str());
  }
  fail("deadlock%s", all);
}

inline void check_fence() {
  for (unsigned i = shared_bytes; i < shared_bytes + NATCORE_FENCE; ++i)
    if (::shared[i] != FENCE) fail("a write to byte %u of %u bytes of shared memory", i, shared_bytes);
}

struct Warp {
  const char* operation;  // the one that lanes have come to, of whom there are
  int arrived, exited;
  void* operands[32];
};
static std::vector<Warp> warps;

inline void leave_warp() {
  Warp& warp = warps[current / 32];
  if (warp.arrived > 0) fail("exit, with %d lanes of the warp in %s", warp.arrived, warp.operation);
  ++warp.exited;
}

inline void run_block(int threads) {
  memset(::shared, POISON, shared_bytes);
  memset(::shared + shared_bytes, FENCE, NATCORE_FENCE);
  memset(named, 0, sizeof named);
  fibers.assign(threads, Fiber{});
  warps.assign(threads / 32, Warp{});
  copies.assign(threads, {});
  landing = 0;
  ready.clear();
  for (int i = 0; i < threads; ++i) ready.push_back(i);
  finished = leave_warp;
  if (is_random()) draw_ranks();
  for (;;) {
    const bool first = !ready.empty() && choose_next();
    if (!first && land_some()) continue;
    if (ready.empty()) break;
    resume(take_next());
  }
  for (const Fiber& fiber : fibers)
    if (!fiber.done) deadlock();
  check_fence();
}

static void* kernel_at;
static void** params_at;

// Runs all blocks; the error, or null.
template <typename... Param>
const char* launch_blocks(void (*kernel)(Param...), Dim grid, unsigned threads, unsigned bytes, unsigned its_order,
                          void** params) {
  kernel_at = reinterpret_cast<void*>(kernel), params_at = params;
  body = [] {
    call(reinterpret_cast<void (*)(Param...)>(kernel_at), params_at, std::make_index_sequence<sizeof...(Param)>());
  };
  gridDim = grid, blockDim = {threads, 1, 1}, blockIdx = {0, 0, 0};
  shared_bytes = bytes, order = its_order, randomness = 0x9e3779b9u * (its_order + 1), stacks = nullptr;
  static const char* error;
  error = nullptr;
  if (_setjmp(leave) == 0) {
    current = 0;
    if (bytes > NATCORE_SHARED_LIMIT) fail("%u bytes of shared memory", bytes);
    if (threads % 32 != 0 || threads == 0 || threads > 1024) fail("blocks of %u threads", threads);
    make_stacks(static_cast<int>(threads));
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(static_cast<int>(threads));
  } else {
    error = message;
  }
  if (stacks != nullptr) munmap(stacks, threads * (STACK + GUARD));
  return error;
}

}  // namespace host

inline void __syncthreads() { host::wait_at(0, static_cast<int>(host::fibers.size())); }
