"""natten{1,2}dqkrpb and dav without a kernel_size: the bias and the weights tell it. Heads first."""

from __future__ import annotations

from torch import Tensor

from torch_nat.compat.natten.legacy.unfused import scores
from torch_nat.compat.natten.v0_14_5.functional import natten1dav, natten2dav

__all__ = ["natten1dav", "natten1dqkrpb", "natten2dav", "natten2dqkrpb"]


def natten1dqkrpb(query: Tensor, key: Tensor, rpb: Tensor, dilation: int) -> Tensor:
    return scores(1, query, key, _kernel_size(rpb), dilation, rpb=rpb)


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor, dilation: int) -> Tensor:
    return scores(2, query, key, _kernel_size(rpb), dilation, rpb=rpb)


def _kernel_size(rpb: Tensor) -> int:
    """Of a table ``[heads, 2 * kernel_size - 1, ...]``."""
    return (rpb.shape[-1] + 1) // 2
