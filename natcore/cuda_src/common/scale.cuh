// The softmax's scale, split so that the bias keeps its place beside the scores whatever the scale.
#pragma once

constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

// scale = query * unit: S starts from bias / unit and softmax takes exp(unit S). The unit is positive and
// never tiny; a scale that is negative or tiny goes into the queries instead, sign or all of it.
struct ScaleParts {
  float query = 1.f, unit, bias;
  __device__ __forceinline__ explicit ScaleParts(float scale) {
    unit = fabsf(scale);
    if (scale < 0.f) query = -1.f;
    if (unit < 1.f / 4096.f) query = scale, unit = 1.f;
    bias = 1.f / unit;
    unit *= LOG2_E;
  }
};

// A unit for those that need no maximum, so that it may be negative: the scale, but never 0, so that a bias keeps its
// place beside S whatever the scale.
__device__ __forceinline__ float unit_of(float scale) {
  return fabsf(scale) < 1e-30f ? copysignf(1e-30f, scale) : scale;
}
