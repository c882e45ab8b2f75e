"""Fused attention with the bias that NATTEN had until 0.17."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import torch_nat
from torch_nat.compat.natten._arguments import check_dense, ignore, readable

_OPERATIONS: dict[int, Any] = {1: torch_nat.na1d, 2: torch_nat.na2d, 3: torch_nat.na3d}
#: Arguments of xFormers that choose kernels; others would change the result.
_XFORMERS_TUNING = {"op"}


def fused(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: tuple[Any, Any, Any],
    rpb: Tensor | None,
    scale: float | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    xformers_kwargs: dict[str, Any] | None,
) -> Tensor:
    """Neighbourhood attention on ``[batch, *spatial, heads, head_dim]``, heads last.

    ``window``: kernel_size, dilation, is_causal. ``xformers_kwargs`` may choose a kernel, which is ignored
    with a warning; anything else in it raises NotImplementedError.
    """
    kernel_size, dilation, is_causal = window
    check_dense((query, key, value, additional_keys, additional_values))
    changes = set(xformers_kwargs or ()) - _XFORMERS_TUNING
    if changes:
        raise NotImplementedError(
            f"xformers_kwargs has {sorted(changes)}; only {sorted(_XFORMERS_TUNING)} is accepted."
        )
    ignore((), None, {"xformers_kwargs": xformers_kwargs or None})
    if rpb is not None and str(rpb.dtype) not in ("torch.float32", str(query.dtype)):
        rpb = rpb.to(query.dtype)  # as NATTEN did
    return _OPERATIONS[rank](
        readable(query),
        readable(key),
        readable(value),
        kernel_size,
        dilation=1 if dilation is None else dilation,
        is_causal=False if is_causal is None else is_causal,
        scale=scale,
        rpb=rpb,
        additional_keys=None if additional_keys is None else readable(additional_keys),
        additional_values=None if additional_values is None else readable(additional_values),
    )
