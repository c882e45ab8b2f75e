// Stands in for natcore/cuda_src/ptx/math.cuh where kernels are compiled for the host. Subnormals count as zeros.
#pragma once

inline float without_subnormals(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.f, x) : x; }

inline float ex2_approx(float x) { return without_subnormals(exp2f(without_subnormals(x))); }
inline float lg2_approx(float x) { return log2f(without_subnormals(x)); }
inline float rcp_approx(float x) { return without_subnormals(1.f / without_subnormals(x)); }
