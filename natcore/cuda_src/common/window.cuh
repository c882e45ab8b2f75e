// Which keys a query sees on one axis, and its inverse: which queries see a key.
//
// All indices are in-group: position x of an axis with dilation d belongs to group x % d and is the
// (x / d)-th of its group; only keys of the query's own group count. Below, `length` is the group's.
//
//   stride 2, kernel 5, length 12            n (keys) ->
//                                       p    0 1 2 3 4 5 6 7 8 9 a b
//   both queries of a stride block      0,1  # # # # # . . . . . . .   centre 1, clamped at the start
//   share one window, centred on        2,3  . # # # # # . . . . . .   centre 3
//   position stride / 2 of the block    4,5  . . . # # # # # . . . .   centre 5
//   and clamped to the map              6,7  . . . . . # # # # # . .   centre 7
//                                       8,9  . . . . . . . # # # # #   centre 9
//                                       a,b  . . . . . . . # # # # #   centre 11, clamped at the end
//
// Start and end never fall as p grows, so a column of the picture is one run of queries: the queries
// that see key n are the p with end(p) > n (a suffix) and start(p) <= n (a prefix).
#pragma once

struct Axis {
  int extent, kernel, stride, dilation, causal;
};

struct Interval {
  int start, end;  // [start, end)
};

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }

__device__ __forceinline__ int group_length(const Axis& axis, int group) {
  return axis.dilation == 1 ? axis.extent : (axis.extent - group + axis.dilation - 1) / axis.dilation;
}

// The first query of p's stride block.
__device__ __forceinline__ int block_start(const Axis& axis, int p) {
  return axis.stride == 1 ? p : p / axis.stride * axis.stride;
}

// The keys that query p sees. Never empty.
__device__ __forceinline__ Interval keys_of(const Axis& axis, int p, int length) {
  if (axis.causal) {
    const int leader = smaller(block_start(axis, p) + axis.stride - 1, length - 1);
    return {larger(leader - axis.kernel + 1, 0), p + 1};
  }
  const int center = smaller(block_start(axis, p) + axis.stride / 2, length - 1);
  const int start = smaller(larger(center - axis.kernel / 2, 0), length - axis.kernel);
  return {start, start + axis.kernel};
}

// The queries that see key n: the exact inverse of keys_of. Never empty.
__device__ __forceinline__ Interval queries_of(const Axis& axis, int n, int length) {
  const int stride = axis.stride;
  if (axis.causal) {
    // start(p) <= n where leader(p) <= reach; the last leader is clamped to length - 1.
    const int reach = n + axis.kernel - 1;
    const int end = reach >= length - 1 ? length : smaller((reach + 1 - stride) / stride * stride + stride, length);
    return {n, end};
  }
  const int half = stride / 2, left = axis.kernel / 2;
  // end(p) > n where the start, centre - left before clamping, is at least n - kernel + 1.
  const int least = n - axis.kernel + 1;
  int first = 0;
  if (least > 0) {
    const int blocks = larger(least + left - half + stride - 1, 0) / stride;
    first = smaller(blocks * stride, length);
  }
  // start(p) <= n: always where the window is clamped at the end, else where the centre is at most n + left.
  int end = length;
  if (n < length - axis.kernel && n + left < length - 1) {
    end = smaller((n + left - half) / stride * stride + stride, length);
  }
  return {first, end};
}
