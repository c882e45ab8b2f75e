"""NeighborhoodAttention1D, 2D and 3D of NATTEN 0.20.0: the later ones, whose embed_dim is called dim."""

from __future__ import annotations

from typing import Any

from torch_nat.compat.natten.v0_21 import modules as current

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


class _OfRank(current.NeighborhoodAttentionGeneric):
    rank: int

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Any,
        stride: Any = 1,
        dilation: Any = 1,
        is_causal: Any = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ):
        window = (kernel_size, stride, dilation, is_causal)
        super().__init__(self.rank, dim, num_heads, *window, qkv_bias, qk_scale, proj_drop)


class NeighborhoodAttention1D(_OfRank):
    __doc__ = current.NeighborhoodAttention1D.__doc__
    rank = 1


class NeighborhoodAttention2D(_OfRank):
    __doc__ = current.NeighborhoodAttention2D.__doc__
    rank = 2


class NeighborhoodAttention3D(_OfRank):
    __doc__ = current.NeighborhoodAttention3D.__doc__
    rank = 3
