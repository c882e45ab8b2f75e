"""Unfused attention heads first and fused attention heads last, with the arguments of NATTEN 0.17.

dilation comes before is_causal, and there is no stride: in 0.20 stride took the place of dilation.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_nat.compat.natten.legacy.fused import fused
from torch_nat.compat.natten.legacy.unfused import PerAxis, PerAxisFlag, scores, weighted_sums

__all__ = ["na1d", "na1d_av", "na1d_qk", "na2d", "na2d_av", "na2d_qk", "na3d", "na3d_av", "na3d_qk"]


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None = 1,
    is_causal: PerAxisFlag = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    xformers_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    window = (kernel_size, dilation, is_causal)
    return fused(1, query, key, value, window, rpb, scale, additional_keys, additional_values, xformers_kwargs)


def na1d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: PerAxisFlag = False,
    rpb: Tensor | None = None,
) -> Tensor:
    return scores(1, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def na1d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None = 1,
    additional_values: Tensor | None = None,
    is_causal: PerAxisFlag = False,
) -> Tensor:
    return weighted_sums(1, attn, value, kernel_size, dilation, additional_values, is_causal)


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None = 1,
    is_causal: PerAxisFlag = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    xformers_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    window = (kernel_size, dilation, is_causal)
    return fused(2, query, key, value, window, rpb, scale, additional_keys, additional_values, xformers_kwargs)


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: PerAxisFlag = False,
    rpb: Tensor | None = None,
) -> Tensor:
    return scores(2, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None = 1,
    additional_values: Tensor | None = None,
    is_causal: PerAxisFlag = False,
) -> Tensor:
    return weighted_sums(2, attn, value, kernel_size, dilation, additional_values, is_causal)


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None = 1,
    is_causal: PerAxisFlag = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    xformers_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    window = (kernel_size, dilation, is_causal)
    return fused(3, query, key, value, window, rpb, scale, additional_keys, additional_values, xformers_kwargs)


def na3d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None = 1,
    additional_keys: Tensor | None = None,
    is_causal: PerAxisFlag = False,
    rpb: Tensor | None = None,
) -> Tensor:
    return scores(3, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)


def na3d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None = 1,
    additional_values: Tensor | None = None,
    is_causal: PerAxisFlag = False,
) -> Tensor:
    return weighted_sums(3, attn, value, kernel_size, dilation, additional_values, is_causal)
