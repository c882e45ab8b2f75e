// The window geometry of the kernels, callable from Python.
#include "shim.h"

#include "common/window.cuh"

extern "C" void keys_and_queries(int extent, int kernel, int stride, int dilation, int causal, int* keys, int* queries) {
  const Axis axis{extent, kernel, stride, dilation, causal};
  for (int x = 0; x < extent; ++x) {
    const int length = group_length(axis, x % dilation);
    const Interval seen = keys_of(axis, x / dilation, length), seers = queries_of(axis, x / dilation, length);
    keys[2 * x] = seen.start, keys[2 * x + 1] = seen.end;
    queries[2 * x] = seers.start, queries[2 * x + 1] = seers.end;
  }
}
