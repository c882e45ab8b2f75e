// What the compiler is not to keep in registers.
#pragma once

// The same value, which the compiler takes for a new one: what depends on it is computed again where it is needed.
__device__ __forceinline__ int anew(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// As anew, for a lane's number, whose range the compiler needs for division by shifts.
__device__ __forceinline__ int anew_lane(int lane) {
  lane = anew(lane);
  __builtin_assume(0 <= lane && lane < 32);
  return lane;
}
