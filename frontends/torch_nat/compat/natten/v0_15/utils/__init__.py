"""Helpers that NATTEN's callers import."""

from torch_nat.compat.natten.legacy.shapes import (
    check_additional_keys,
    check_additional_values,
    make_attn_tensor_from_input,
)
from torch_nat.compat.natten.v0_15.utils import testing

NoneType = type(None)

__all__ = ["NoneType", "check_additional_keys", "check_additional_values", "make_attn_tensor_from_input", "testing"]
