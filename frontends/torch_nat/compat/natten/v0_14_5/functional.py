"""natten{1,2}dqkrpb and dav of NATTEN 0.14.5, heads first: dav has no kernel_size yet, and dqk does not exist."""

from __future__ import annotations

from torch import Tensor

from torch_nat.compat.natten.legacy.unfused import weighted_sums
from torch_nat.compat.natten.v0_14.functional import natten1dqkrpb, natten2dqkrpb

__all__ = ["natten1dav", "natten1dqkrpb", "natten2dav", "natten2dqkrpb"]


def natten1dav(attn: Tensor, value: Tensor, dilation: int) -> Tensor:
    return weighted_sums(1, attn, value, attn.shape[-1], dilation)


def natten2dav(attn: Tensor, value: Tensor, dilation: int) -> Tensor:
    kernel_size = round(attn.shape[-1] ** 0.5)
    if kernel_size**2 != attn.shape[-1]:
        raise ValueError(f"attn has {attn.shape[-1]} weights per query; expected the square of a kernel_size.")
    return weighted_sums(2, attn, value, kernel_size, dilation)
