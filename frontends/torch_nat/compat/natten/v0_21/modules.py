"""NeighborhoodAttention1D, 2D and 3D with the arguments, parameters and attributes of NATTEN 0.21.

Only NATTEN's own attributes are read, so that whole modules pickled under NATTEN load and run.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import torch_nat
from torch_nat.compat.natten.v0_21.functional import PerAxis, PerAxisFlag
from torch_nat.compat.natten.v0_21.utils.checks import check_all_args

_PACKED: dict[int, Any] = {1: torch_nat.na1d_qkvpacked, 2: torch_nat.na2d_qkvpacked, 3: torch_nat.na3d_qkvpacked}


class NeighborhoodAttentionGeneric(nn.Module):
    """Projections around neighbourhood attention on ``[batch, *spatial, embed_dim]``.

    Parameters ``qkv`` and ``proj`` as in NATTEN. Raises ValueError for an embed_dim that num_heads does
    not divide, for windows that NATTEN refuses, and, when called, for an input of another shape.
    """

    def __init__(
        self,
        na_dim: int,
        embed_dim: int,
        num_heads: int,
        kernel_size: PerAxis,
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
        is_causal: PerAxisFlag = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        window = check_all_args(na_dim, kernel_size, stride, dilation, is_causal)
        self.kernel_size, self.stride, self.dilation, self.is_causal = window
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}.")
        self.na_dim, self.embed_dim, self.num_heads = na_dim, embed_dim, num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != self.na_dim + 2 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"input has shape {tuple(x.shape)}; expected {self.na_dim + 2} axes, the last of {self.embed_dim}."
            )
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        window = dict(stride=self.stride, dilation=self.dilation, is_causal=self.is_causal)
        out = _PACKED[self.na_dim](qkv, self.kernel_size, **window, scale=self.scale)
        return self.proj_drop(self.proj(out.flatten(-2)))

    def extra_repr(self) -> str:
        names = ("head_dim", "num_heads", "kernel_size", "stride", "dilation", "is_causal")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class _OfRank(NeighborhoodAttentionGeneric):
    rank: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: PerAxis,
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
        is_causal: PerAxisFlag = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ):
        window = (kernel_size, stride, dilation, is_causal)
        super().__init__(self.rank, embed_dim, num_heads, *window, qkv_bias, qk_scale, proj_drop)


class NeighborhoodAttention1D(_OfRank):
    __doc__ = (NeighborhoodAttentionGeneric.__doc__ or "").replace("*spatial", "length")
    rank = 1


class NeighborhoodAttention2D(_OfRank):
    __doc__ = (NeighborhoodAttentionGeneric.__doc__ or "").replace("*spatial", "height, width")
    rank = 2


class NeighborhoodAttention3D(_OfRank):
    __doc__ = (NeighborhoodAttentionGeneric.__doc__ or "").replace("*spatial", "depth, height, width")
    rank = 3
