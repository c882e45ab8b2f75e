// The threads of a block as fibers of one thread of the host: each runs until it waits for something.
//
// A fiber is entered by setcontext once; afterwards _setjmp and _longjmp switch, without a system call. Which of those
// that can go on is next, and when asynchronous copies land (see block.h), is the `order`:
//   EAGER   first come, first served; copies land when they are issued
//   LATE    first come, first served; copies land when somebody waits for them and nobody can go on otherwise
//   n       2 and more: warps, and copies too, have ranks, drawn from seed n and now and then anew, so that some fall
//           far behind or run far ahead; who of a warp is first is random
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <deque>
#include <vector>

#include "shim.h"

namespace host {

enum Order : unsigned { EAGER, LATE };

constexpr size_t STACK = 128 << 10, GUARD = 16 << 10;  // bytes; the guard lies below and faults

struct Fiber {
  jmp_buf place;
  bool started, done;
  const char* awaits;     // what for, in words; null: nothing
  unsigned which, state;  // of a barrier: which one; of an mbarrier: the parity awaited
};

static std::vector<Fiber> fibers;
static std::deque<int> ready;
static int current;  // the fiber that runs
static unsigned order, randomness;
static unsigned ranks[33];  // of warps, then of copies: the highest goes first
static unsigned char* stacks;
static void (*body)();  // what each fiber runs
static void (*finished)();  // called by a fiber at its end
static jmp_buf scheduler, leave;
static char message[4096];

// Ends the launch: `launch_blocks` returns the message.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  const int length = snprintf(message, sizeof message, "block %u, thread %d: ", blockIdx.x, current);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message + length, sizeof message - length, format, arguments);
  va_end(arguments);
  _longjmp(leave, 1);
}

inline unsigned random_below(unsigned end) {  // xorshift32, Marsaglia 2003
  randomness ^= randomness << 13, randomness ^= randomness >> 17, randomness ^= randomness << 5;
  return randomness % end;
}
inline bool is_random() { return order > LATE; }

inline void enter() {
  body();
  finished();
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

// Lets others run; the fiber is taken up again after `wake`.
__attribute__((noinline)) inline void pause_here() {
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}
inline void wait_for(const char* what, unsigned which = 0, unsigned state = 0) {
  fibers[current].awaits = what, fibers[current].which = which, fibers[current].state = state;
  pause_here();
}
inline void wake(int fiber) {
  fibers[fiber].awaits = nullptr;
  ready.push_back(fiber);
}
// Where others might come first.
inline void maybe_give_way() {
  if (!is_random() || random_below(4) != 0) return;
  ready.push_back(current);
  pause_here();
}

__attribute__((noinline)) inline void resume(int fiber) {
  current = fiber, threadIdx = {static_cast<unsigned>(fiber), 0, 0};
  if (_setjmp(scheduler) != 0) return;
  if (fibers[fiber].started) _longjmp(fibers[fiber].place, 1);
  fibers[fiber].started = true;
  static ucontext_t first;
  getcontext(&first);
  first.uc_stack.ss_sp = stacks + fiber * (STACK + GUARD) + GUARD;
  first.uc_stack.ss_size = STACK;
  first.uc_link = nullptr;
  makecontext(&first, enter, 0);
  setcontext(&first);
}

inline void draw_ranks() {
  for (unsigned& rank : ranks) rank = random_below(1u << 20);
}

// Brings who is next to the front of those that can go on; false where copies rank higher.
inline bool choose_next() {
  if (!is_random()) return true;
  if (random_below(256) == 0) ranks[random_below(33)] = random_below(1u << 20);
  std::swap(ready.front(), ready[random_below(static_cast<unsigned>(ready.size()))]);
  for (int& fiber : ready)
    if (ranks[fiber / 32] > ranks[ready.front() / 32]) std::swap(ready.front(), fiber);
  return ranks[32] <= ranks[ready.front() / 32];
}
inline int take_next() {
  const int fiber = ready.front();
  ready.pop_front();
  return fiber;
}

// Memory for the stacks of so many fibers.
inline void make_stacks(int count) {
  void* memory = mmap(nullptr, count * (STACK + GUARD), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("no memory for the stacks of %d threads", count);
  stacks = static_cast<unsigned char*>(memory);
  for (int i = 0; i < count; ++i) mprotect(stacks + i * (STACK + GUARD), GUARD, PROT_NONE);
}

}  // namespace host
