"""Shapes of attention weights, for callers that allocate or check them."""

from __future__ import annotations

import torch
from torch import Tensor


def make_attn_tensor_from_input(input_tensor: Tensor, attention_dim: int) -> Tensor:
    """Uninitialised weights for a query ``[batch, heads, *spatial, head_dim]``."""
    return torch.empty(
        (*input_tensor.shape[:-1], attention_dim),
        dtype=input_tensor.dtype,
        device=input_tensor.device,
        requires_grad=input_tensor.requires_grad,
    )


def check_additional_keys(input_tensor: Tensor, additional_keys: Tensor | None) -> int:
    """How many additional keys ``[batch, heads, extra, head_dim]``; raises ValueError where they do not fit."""
    if additional_keys is None:
        return 0
    expected = (*input_tensor.shape[:2], additional_keys.shape[-2], input_tensor.shape[-1])
    if additional_keys.dim() != 4 or tuple(additional_keys.shape) != expected:
        raise ValueError(f"additional keys have shape {tuple(additional_keys.shape)}; expected {expected}.")
    return additional_keys.shape[2]


def check_additional_values(
    attn_tensor: Tensor, additional_values: Tensor | None, value: Tensor, expected_attn_weights: int
) -> int:
    """How many additional values; raises ValueError where weights and values do not fit together."""
    extra = 0
    if additional_values is not None:
        extra = additional_values.shape[-2]
        expected = (*attn_tensor.shape[:2], extra, value.shape[-1])
        if additional_values.dim() != 4 or tuple(additional_values.shape) != expected:
            raise ValueError(f"additional values have shape {tuple(additional_values.shape)}; expected {expected}.")
    if attn_tensor.shape[-1] != expected_attn_weights + extra:
        raise ValueError(f"{attn_tensor.shape[-1]} weights per query; expected {expected_attn_weights} + {extra}.")
    return extra
