"""FLOPs of neighbourhood attention, by hand and with fvcore. See `torch_nat.compat.natten.legacy.flops`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from math import prod
from typing import Any

import torch

from torch_nat.compat.natten.legacy import flops as legacy
from torch_nat.compat.natten.v0_17.utils.checks import check_all_args

has_fvcore = find_spec("fvcore") is not None


def _product(
    shape: Sequence[int], kernel_size: Any, dilation: Any, is_causal: Any, is_heads_last: bool, return_macs: bool
) -> int:
    """Of every query with the keys of its window (a causal one counts as full)."""
    *outer, dim = shape
    window, _, _ = check_all_args(len(shape) - 3, kernel_size, dilation, is_causal)
    return (1 if return_macs else 2) * prod(outer) * prod(window) * dim


def na_qk_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    kernel_size: Any,
    dilation: Any,
    is_causal: Any,
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Of scores; raises ValueError for unequal shapes."""
    if tuple(q_shape) != tuple(k_shape):
        raise ValueError(f"q {tuple(q_shape)} and k {tuple(k_shape)} must have the same shape.")
    return _product(q_shape, kernel_size, dilation, is_causal, is_heads_last, return_macs)


def na_av_flop_count(
    a_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: Any,
    dilation: Any,
    is_causal: Any,
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Of weighted sums."""
    return _product(v_shape, kernel_size, dilation, is_causal, is_heads_last, return_macs)


def fna_flop_count(
    q_shape: Sequence[int],
    k_shape: Sequence[int],
    v_shape: Sequence[int],
    kernel_size: Any,
    dilation: Any,
    is_causal: Any,
    is_heads_last: bool,
    return_macs: bool = False,
) -> int:
    """Of fused attention: scores and weighted sums."""
    window = (kernel_size, dilation, is_causal, is_heads_last, return_macs)
    return na_qk_flop_count(q_shape, k_shape, *window) + na_av_flop_count(q_shape, v_shape, *window)


def add_natten_handle(flop_ctr: Any) -> Any:
    """Teach an fvcore counter the operations; biases are not counted."""
    return legacy.add_handles(flop_ctr, count_bias=False)


def get_flops(model: torch.nn.Module, input: Any, disable_warnings: bool = False) -> int:
    """The model's multiply-accumulates. Raises ImportError without fvcore."""
    return legacy.total(model, input, disable_warnings, count_bias=False)
