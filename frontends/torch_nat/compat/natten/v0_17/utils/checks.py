"""Checks of arguments, for callers that use them directly. The operations check by themselves."""

from __future__ import annotations

from math import prod
from typing import Any

from torch_nat.compat.natten.v0_21.utils.checks import check_causal_arg, check_dilation_arg, per_axis_entries

__all__ = ["check_all_args", "check_causal_arg", "check_dilation_arg", "check_kernel_size_arg", "get_num_na_weights"]


def get_num_na_weights(kernel_size: tuple[int, ...]) -> int:
    """Keys in a window."""
    return prod(kernel_size)


def check_kernel_size_arg(na_dim: int, kernel_size: Any) -> tuple[int, ...]:
    return per_axis_entries("kernel_size", na_dim, kernel_size, int, 1)


def check_all_args(na_dim: int, kernel_size: Any, dilation: Any, is_causal: Any) -> tuple:
    """(kernel_size, dilation, is_causal), each as a tuple. Raises ValueError for anything else."""
    return (
        check_kernel_size_arg(na_dim, kernel_size),
        check_dilation_arg(na_dim, dilation),
        check_causal_arg(na_dim, is_causal),
    )
