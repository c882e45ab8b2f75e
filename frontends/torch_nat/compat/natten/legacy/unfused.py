"""Attention weights heads first, as NATTEN had them until 0.17.

q, k, v are ``[batch, heads, *spatial, head_dim]``, additional keys ``[batch, heads, extra, head_dim]``,
weights ``[batch, heads, *spatial, prod(kernel_size) + extra]``: the window row-major, then the
additional keys. All are views of torch_nat's heads-last operations; nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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
    """q . k + rpb over each window, without a scale; -infinity where a causal query sees no key.

    Nested tensors (of entries with a batch axis of their own) give a nested tensor.
    """
    if query.is_nested or key.is_nested:
        window = (kernel_size, dilation)
        return _each(
            lambda q, k, k_add: scores(rank, q, k, *window, k_add, is_causal, rpb), query, key, additional_keys
        )
    check_dense((query, key, additional_keys, rpb))
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
    """``[batch, heads, *spatial, head_dim]``: each window's values (and the additional ones) times its weights.

    Nested tensors give a nested tensor.
    """
    if attn.is_nested or value.is_nested:
        window = (kernel_size, dilation)
        return _each(
            lambda a, v, v_add: weighted_sums(rank, a, v, *window, v_add, is_causal), attn, value, additional_values
        )
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


def _each(operation: Callable[..., Tensor], first: Tensor, second: Tensor, extra: Tensor | None) -> Tensor:
    """``operation`` on each entry of nested tensors, nested. Raises ValueError unless all are, and equally long."""
    operands = (first, second) if extra is None else (first, second, extra)
    if not all(operand.is_nested for operand in operands) or len({operand.size(0) for operand in operands}) > 1:
        found = [f"nested of {x.size(0)}" if x.is_nested else f"dense {tuple(x.shape)}" for x in operands]
        raise ValueError(f"operands are {', '.join(found)}: all must be nested, with as many entries.")
    entries = [operand.unbind() for operand in operands]
    results = [operation(*entry, *(() if extra is not None else (None,))) for entry in zip(*entries, strict=True)]
    return torch.nested.as_nested_tensor([result.contiguous() for result in results])


def _heads_last(tensor: Tensor, rank: int) -> Tensor:
    """``[batch, heads, *spatial, dim]`` as a view ``[batch, *spatial, heads, dim]``."""
    if tensor.dim() != rank + 3:
        axes = ", ".join(f"axis{a}" for a in range(rank))
        raise ValueError(f"got {tuple(tensor.shape)}; expected {rank + 3} axes, [batch, heads, {axes}, dim].")
    return readable(tensor).movedim(1, -2)
