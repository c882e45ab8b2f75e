"""Unfused attention heads first, with the arguments of NATTEN 0.15. See `torch_nat.compat.natten.legacy.unfused`."""

from __future__ import annotations

from torch import Tensor

from torch_nat.compat.natten.legacy.hardware import (
    disable_gemm_na,
    disable_tf32,
    disable_tiled_na,
    enable_gemm_na,
    enable_tf32,
    enable_tiled_na,
    get_device_cc,
    has_bfloat,
    has_cuda,
    has_fp32_gemm,
    has_fp64_gemm,
    has_gemm,
    has_half,
    has_tf32_gemm,
)
from torch_nat.compat.natten.legacy.unfused import scores, weighted_sums

__all__ = [
    "disable_gemm_na",
    "disable_tf32",
    "disable_tiled_na",
    "enable_gemm_na",
    "enable_tf32",
    "enable_tiled_na",
    "get_device_cc",
    "has_bfloat",
    "has_cuda",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_gemm",
    "has_half",
    "has_tf32_gemm",
    "na1d_av",
    "na1d_qk",
    "na1d_qk_with_bias",
    "na2d_av",
    "na2d_qk",
    "na2d_qk_with_bias",
    "na3d_av",
    "na3d_qk",
    "na3d_qk_with_bias",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
]


def na1d_qk(
    query: Tensor, key: Tensor, kernel_size: int, dilation: int, additional_keys: Tensor | None = None
) -> Tensor:
    return scores(1, query, key, kernel_size, dilation, additional_keys)


def na1d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    return scores(1, query, key, kernel_size, dilation, additional_keys, rpb=bias)


def na1d_av(
    attn: Tensor, value: Tensor, kernel_size: int, dilation: int, additional_values: Tensor | None = None
) -> Tensor:
    return weighted_sums(1, attn, value, kernel_size, dilation, additional_values)


def na2d_qk(
    query: Tensor, key: Tensor, kernel_size: int, dilation: int, additional_keys: Tensor | None = None
) -> Tensor:
    return scores(2, query, key, kernel_size, dilation, additional_keys)


def na2d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    return scores(2, query, key, kernel_size, dilation, additional_keys, rpb=bias)


def na2d_av(
    attn: Tensor, value: Tensor, kernel_size: int, dilation: int, additional_values: Tensor | None = None
) -> Tensor:
    return weighted_sums(2, attn, value, kernel_size, dilation, additional_values)


def _depth_first(depth: int, plane: int) -> tuple[int, int, int]:
    """The window of a 3-D call: one number for the depth, one for height and width."""
    return depth, plane, plane


def na3d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    window = _depth_first(kernel_size_d, kernel_size), _depth_first(dilation_d, dilation)
    return scores(3, query, key, *window, additional_keys)


def na3d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_keys: Tensor | None = None,
) -> Tensor:
    window = _depth_first(kernel_size_d, kernel_size), _depth_first(dilation_d, dilation)
    return scores(3, query, key, *window, additional_keys, rpb=bias)


def na3d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
    additional_values: Tensor | None = None,
) -> Tensor:
    window = _depth_first(kernel_size_d, kernel_size), _depth_first(dilation_d, dilation)
    return weighted_sums(3, attn, value, *window, additional_values)


def natten1dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    return na1d_qk_with_bias(query, key, rpb, kernel_size, dilation)


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    return na2d_qk_with_bias(query, key, rpb, kernel_size, dilation)


def natten3dqkrpb(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    kernel_size_d: int,
    kernel_size: int,
    dilation_d: int,
    dilation: int,
) -> Tensor:
    return na3d_qk_with_bias(query, key, rpb, kernel_size_d, kernel_size, dilation_d, dilation)


natten1dqk, natten1dav = na1d_qk, na1d_av
natten2dqk, natten2dav = na2d_qk, na2d_av
natten3dqk, natten3dav = na3d_qk, na3d_av
