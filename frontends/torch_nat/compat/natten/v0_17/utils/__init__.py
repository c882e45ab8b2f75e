"""Helpers that NATTEN's callers import."""

from torch_nat.compat.natten.v0_17.utils import checks, log, misc, tensor, testing
from torch_nat.compat.natten.v0_17.utils.checks import (
    check_all_args,
    check_causal_arg,
    check_dilation_arg,
    check_kernel_size_arg,
    get_num_na_weights,
)
from torch_nat.compat.natten.v0_17.utils.misc import get_device_cc
from torch_nat.compat.natten.v0_17.utils.tensor import (
    check_additional_keys,
    check_additional_values,
    make_attn_tensor_from_input,
)

__all__ = [
    "check_additional_keys",
    "check_additional_values",
    "check_all_args",
    "check_causal_arg",
    "check_dilation_arg",
    "check_kernel_size_arg",
    "checks",
    "get_device_cc",
    "get_num_na_weights",
    "log",
    "make_attn_tensor_from_input",
    "misc",
    "tensor",
    "testing",
]
