// What the 32 lanes of a warp do together: each lane hands in its operands, the last one computes for all.
#pragma once

#include "block.h"

namespace host {

inline int lane_of_current() { return current % 32; }

// `compute` gets the operands of all lanes, by pointers to them, and writes results into them.
template <typename Operands, typename Compute>
void together(const char* operation, Operands& mine, Compute compute) {
  Warp& warp = warps[current / 32];
  if (warp.exited > 0) fail("%s, with %d lanes of the warp gone", operation, warp.exited);
  if (warp.arrived == 0) warp.operation = operation;
  if (strcmp(warp.operation, operation) != 0)
    fail("%s, with %d lanes of the warp in %s", operation, warp.arrived, warp.operation);
  warp.operands[current % 32] = &mine;
  if (++warp.arrived < 32) return wait_for(operation);
  warp.arrived = 0;
  compute(reinterpret_cast<Operands**>(warp.operands));
  const int first = current / 32 * 32;
  for (int i = first; i < first + 32; ++i)
    if (i != current) wake(i);
  maybe_give_way();
}

// The value of the lane that `from` names for each lane; its own where that is none of its segment of `width`.
template <typename T, typename From>
T shuffle(const char* operation, unsigned mask, T value, int width, From from) {
  if (mask != ~0u) fail("%s with mask %#x: only whole warps are supported", operation, mask);
  struct Operands {
    T value, result;
  } mine{value, value};
  together(operation, mine, [&](Operands** all) {
    for (int lane = 0; lane < 32; ++lane) {
      const int source = from(lane), start = lane / width * width;
      if (start <= source && source < start + width) all[lane]->result = all[source]->value;
    }
  });
  return mine.result;
}

}  // namespace host

inline void __syncwarp(unsigned mask = ~0u) {
  if (mask != ~0u) host::fail("__syncwarp with mask %#x: only whole warps are supported", mask);
  char nothing = 0;
  host::together("__syncwarp", nothing, [](char**) {});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other, int width = 32) {
  return host::shuffle("__shfl_xor_sync", mask, value, width, [=](int lane) { return lane ^ other; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return host::shuffle("__shfl_up_sync", mask, value, width, [=](int lane) { return lane - static_cast<int>(by); });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return host::shuffle("__shfl_down_sync", mask, value, width, [=](int lane) { return lane + static_cast<int>(by); });
}

// The lane to read from differs between lanes.
template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  if (mask != ~0u) host::fail("__shfl_sync with mask %#x: only whole warps are supported", mask);
  struct Operands {
    T value, result;
    int from;
  } mine{value, value, from};
  host::together("__shfl_sync", mine, [&](Operands** all) {
    for (int lane = 0; lane < 32; ++lane)
      all[lane]->result = all[lane / width * width + (all[lane]->from & (width - 1))]->value;
  });
  return mine.result;
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  if (mask != ~0u) host::fail("__ballot_sync with mask %#x: only whole warps are supported", mask);
  struct Operands {
    int predicate;
    unsigned result;
  } mine{predicate, 0};
  host::together("__ballot_sync", mine, [](Operands** all) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= (all[lane]->predicate != 0 ? 1u : 0u) << lane;
    for (int lane = 0; lane < 32; ++lane) all[lane]->result = votes;
  });
  return mine.result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == ~0u; }
