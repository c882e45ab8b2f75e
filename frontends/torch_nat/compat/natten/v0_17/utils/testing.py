"""Decorators by which NATTEN's callers skip unittest methods."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from torch_nat.compat.natten.legacy.hardware import get_device_cc, has_fna
from torch_nat.compat.natten.v0_15.utils.testing import (
    skip_if_cuda_is_not_supported,
    skip_if_gemm_does_not_support_double_precision,
    skip_if_gemm_is_not_supported,
    skip_if_nested_is_not_supported,
)
from torch_nat.compat.natten.v0_21.utils.testing import skip_unless

__all__ = [
    "fna_supports_additional_kv",
    "skip_if_cuda_is_not_supported",
    "skip_if_experimental_ops_are_not_supported",
    "skip_if_fna_is_not_supported",
    "skip_if_fvcore_is_not_available",
    "skip_if_gemm_does_not_support_double_precision",
    "skip_if_gemm_is_not_supported",
    "skip_if_nested_is_not_supported",
    "skip_if_torch_compile_is_not_supported",
    "skip_if_torch_flop_count_is_not_supported",
    "skip_if_triton_is_not_supported",
]


def skip_if_fna_is_not_supported() -> Callable:
    return skip_unless(has_fna, "Fused kernels are asked for on a GPU.")


def skip_if_experimental_ops_are_not_supported() -> Callable:
    return skip_unless(lambda: True, "")


def skip_if_torch_compile_is_not_supported() -> Callable:
    return skip_unless(lambda: True, "")


def skip_if_torch_flop_count_is_not_supported() -> Callable:
    return skip_unless(lambda: True, "")


def skip_if_triton_is_not_supported() -> Callable:
    return skip_unless(lambda: get_device_cc() >= 70, "Triton needs a GPU of compute capability 7.0.")


def skip_if_fvcore_is_not_available() -> Callable:
    return skip_unless(lambda: find_spec("fvcore") is not None, "fvcore is not installed.")


def fna_supports_additional_kv(head_dim: int | None = None, device_index: int | None = None) -> bool:
    """On every GPU, for every head_dim, without xFormers too. (0.17.4 asked without arguments, 0.17.5 with them.)"""
    return True
