"""Helpers that NATTEN's callers import."""

from torch_nat.compat.natten.v0_15.utils import tensor, testing, typing
from torch_nat.compat.natten.v0_15.utils.tensor import (
    check_additional_keys,
    check_additional_values,
    make_attn_tensor_from_input,
)
from torch_nat.compat.natten.v0_15.utils.typing import NoneType

__all__ = [
    "NoneType",
    "check_additional_keys",
    "check_additional_values",
    "make_attn_tensor_from_input",
    "tensor",
    "testing",
    "typing",
]
