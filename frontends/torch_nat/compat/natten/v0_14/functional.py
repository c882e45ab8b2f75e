"""natten{1,2}dqk, dqkrpb and dav, heads first. See `torch_nat.compat.natten.legacy.unfused`."""

from __future__ import annotations

from torch import Tensor

from torch_nat.compat.natten.legacy.unfused import scores, weighted_sums

__all__ = ["natten1dav", "natten1dqk", "natten1dqkrpb", "natten2dav", "natten2dqk", "natten2dqkrpb"]


def natten1dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    return scores(1, query, key, kernel_size, dilation, rpb=rpb)


def natten1dqk(query: Tensor, key: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return scores(1, query, key, kernel_size, dilation)


def natten1dav(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return weighted_sums(1, attn, value, kernel_size, dilation)


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    return scores(2, query, key, kernel_size, dilation, rpb=rpb)


def natten2dqk(query: Tensor, key: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return scores(2, query, key, kernel_size, dilation)


def natten2dav(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return weighted_sums(2, attn, value, kernel_size, dilation)
