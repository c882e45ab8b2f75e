"""The names of NATTEN's slow reference kernels: here the same operations as everywhere."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torch_nat.compat.natten.v0_21.functional import PerAxis, PerAxisFlag, neighborhood_attention_generic

__all__ = ["na1d_reference", "na2d_reference", "na3d_reference", "reference_fna_generic"]


def reference_fna_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    is_causal: PerAxisFlag = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """na1d, na2d or na3d, by the number of axes of ``query``."""
    window = (kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values)
    return neighborhood_attention_generic(query, key, value, *window, return_lse=return_lse)


na1d_reference = na2d_reference = na3d_reference = reference_fna_generic
