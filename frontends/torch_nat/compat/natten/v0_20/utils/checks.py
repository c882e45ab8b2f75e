"""Checks of arguments until 0.21.1. Those of tensors do not ask yet whether heads may be shared."""

from __future__ import annotations

from torch import Tensor

from torch_nat.compat.natten.v0_21.utils import checks as current
from torch_nat.compat.natten.v0_21.utils.checks import (
    check_all_args,
    check_args_against_input,
    check_causal_arg,
    check_dilation_arg,
    check_input_size_arg,
    check_kernel_schedule,
    check_kernel_size_arg,
    check_stride_arg,
    check_tile_shape,
)

__all__ = [
    "additional_kv_tensor_checks",
    "check_all_args",
    "check_args_against_input",
    "check_causal_arg",
    "check_dilation_arg",
    "check_input_size_arg",
    "check_kernel_schedule",
    "check_kernel_size_arg",
    "check_stride_arg",
    "check_tile_shape",
    "fmha_tensor_checks",
    "is_self_attention",
    "na_tensor_checks",
]


def na_tensor_checks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    must_match_head_dims: bool = False,
    raise_error: bool = True,
    backend_name: str | None = None,
) -> bool:
    """Whether q, k and v go together for na1d, na2d or na3d; raises ValueError if ``raise_error``."""
    asked = dict(must_match_head_dims=must_match_head_dims, raise_error=raise_error, backend_name=backend_name)
    return current.na_tensor_checks(query, key, value, **asked)  # type: ignore[arg-type]


def fmha_tensor_checks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    must_match_head_dims: bool = False,
    raise_error: bool = True,
    backend_name: str | None = None,
) -> bool:
    """Whether q, k and v go together for attention; raises ValueError if ``raise_error``."""
    asked = dict(must_match_head_dims=must_match_head_dims, raise_error=raise_error, backend_name=backend_name)
    return current.fmha_tensor_checks(query, key, value, **asked)  # type: ignore[arg-type]


def additional_kv_tensor_checks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    add_key: Tensor | None = None,
    add_value: Tensor | None = None,
    must_match_head_dims: bool = False,
) -> None:
    """Raises ValueError unless additional keys and values go with q, k and v."""
    current.additional_kv_tensor_checks(query, key, value, add_key, add_value, must_match_head_dims)


def is_self_attention(input_tensor: Tensor, kernel_size: tuple[int, ...], is_causal: tuple[bool, ...]) -> bool:
    """Whether the window is the whole map, so that this is plain (in 1-D perhaps causal) attention."""
    return current.is_self_attention(input_tensor, kernel_size, is_causal)
