"""Attention weights heads first, as NATTEN had them until 0.17.

q, k, v are ``[batch, heads, *spatial, head_dim]``, additional keys ``[batch, heads, extra, head_dim]``,
weights ``[batch, heads, *spatial, prod(kernel_size) + extra]``: the window row-major, then the
additional keys. All are views of torch_nat's heads-last operations; nothing is copied.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import torch_nat
from torch_nat.compat.natten._arguments import check_dense, readable

PerAxis = int | tuple[int, ...] | list[int]
PerAxisFlag = bool | tuple[bool, ...] | list[bool] | None


def scores(
    rank: int,
    query: Tensor,
    key: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None,
    additional_keys: Tensor | None = None,
    is_causal: PerAxisFlag = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """q . k + rpb over each window, without a scale; -infinity where a causal query sees no key."""
    check_dense((query, key, additional_keys))
    if rpb is not None and str(rpb.dtype) not in ("torch.float32", str(query.dtype)):
        rpb = rpb.to(query.dtype)  # as NATTEN did
    operation: Any = getattr(torch_nat, f"na{rank}d_qk")
    attn = operation(
        _heads_last(query, rank),
        _heads_last(key, rank),
        kernel_size,
        dilation=1 if dilation is None else dilation,
        is_causal=False if is_causal is None else is_causal,
        scale=1.0,
        rpb=rpb,
        additional_keys=None if additional_keys is None else _heads_last(additional_keys, 1),
    )
    return attn.movedim(-2, 1)


def weighted_sums(
    rank: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis | None,
    additional_values: Tensor | None = None,
    is_causal: PerAxisFlag = False,
) -> Tensor:
    """``[batch, heads, *spatial, head_dim]``: each window's values (and the additional ones) times its weights."""
    check_dense((attn, value, additional_values))
    operation: Any = getattr(torch_nat, f"na{rank}d_av")
    out = operation(
        _heads_last(attn, rank),
        _heads_last(value, rank),
        kernel_size,
        dilation=1 if dilation is None else dilation,
        is_causal=False if is_causal is None else is_causal,
        additional_values=None if additional_values is None else _heads_last(additional_values, 1),
    )
    return out.movedim(-2, 1)


def _heads_last(tensor: Tensor, rank: int) -> Tensor:
    """``[batch, heads, *spatial, dim]`` as a view ``[batch, *spatial, heads, dim]``."""
    if tensor.dim() != rank + 3:
        axes = ", ".join(f"axis{a}" for a in range(rank))
        raise ValueError(f"got {tuple(tensor.shape)}; expected {rank + 3} axes, [batch, heads, {axes}, dim].")
    return readable(tensor).movedim(1, -2)
