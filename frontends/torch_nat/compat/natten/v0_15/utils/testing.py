"""Decorators by which NATTEN's callers skip unittest methods."""

from __future__ import annotations

from collections.abc import Callable

from torch_nat.compat.natten.legacy.hardware import has_cuda, has_fp64_gemm, has_gemm
from torch_nat.compat.natten.v0_21.utils.testing import skip_unless


def skip_if_cuda_is_not_supported() -> Callable:
    return skip_unless(has_cuda, "CUDA is not available.")


def skip_if_gemm_is_not_supported() -> Callable:
    return skip_unless(has_gemm, "Tensor cores need a GPU of compute capability 7.0.")


def skip_if_gemm_does_not_support_double_precision() -> Callable:
    return skip_unless(has_fp64_gemm, "float64 tensor cores need a GPU of compute capability 8.0.")


def skip_if_nested_is_not_supported() -> Callable:
    return skip_unless(lambda: True, "")
