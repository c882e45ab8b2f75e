"""Shapes of attention weights."""

from torch_nat.compat.natten.legacy.shapes import (
    check_additional_keys,
    check_additional_values,
    make_attn_tensor_from_input,
)

__all__ = ["check_additional_keys", "check_additional_values", "make_attn_tensor_from_input"]
