"""Neighbourhood attention as modules, with the parameter names of the published NAT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from natcore.problem import Window
from torch_nat.functional import PerAxis, PerAxisFlag, na1d_qkvpacked, na2d_qkvpacked, na3d_qkvpacked
from torch_nat.token_sums import apply_linear, with_tables

_PACKED: dict[int, Callable[..., Any]] = {1: na1d_qkvpacked, 2: na2d_qkvpacked, 3: na3d_qkvpacked}


class _NeighborhoodAttention(nn.Module):
    """Multi-head neighbourhood attention on channels-last maps, ``[batch, *spatial, embed_dim]``.

    Parameters: ``qkv`` and ``proj`` (linear) and, with ``rel_pos_bias``, ``rpb``
    ``[num_heads, 2 * k0 - 1, ...]``. As in the published code, the scale goes on q . k alone and the
    bias is added unscaled (the paper's formula divides it too).

    Args:
        embed_dim: channels; num_heads must divide it.
        num_heads: attention heads.
        kernel_size: window size, an int or one per axis.
        stride: neighbouring queries that share a window.
        dilation: distance between neighbouring keys of a window.
        is_causal: per axis, whether keys after the query are hidden.
        rel_pos_bias: learn a relative positional bias.
        qkv_bias: give the qkv projection a bias.
        qk_scale: of q . k; head_dim ** -0.5 by default.
        attn_drop: dropout rate of the attention weights, in training (`torch_nat.na2d`'s dropout_p).
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: for a window that is invalid and, when called, for one that does not fit the map.
    """

    rank: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: PerAxis,
        stride: PerAxis = 1,
        dilation: PerAxis = 1,
        is_causal: PerAxisFlag = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}.")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.window = Window.of(self.rank, kernel_size, stride, dilation, is_causal)
        if not 0 <= attn_drop < 1:
            raise ValueError(f"attn_drop {attn_drop} must be in [0, 1).")
        self.scale, self.attn_drop = qk_scale, attn_drop
        self.qkv = with_tables(nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias))
        self.rpb = nn.Parameter(torch.empty(num_heads, *self.window.rpb_shape)) if rel_pos_bias else None
        self.proj = with_tables(nn.Linear(embed_dim, embed_dim))
        self.proj_drop = nn.Dropout(proj_drop)
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, *spatial, embed_dim]`` to the same shape."""
        if x.dim() != self.rank + 2 or x.shape[-1] != self.embed_dim:
            axes = ", ".join(f"axis{a}" for a in range(self.rank))
            raise ValueError(f"input has shape {tuple(x.shape)}; expected [batch, {axes}, {self.embed_dim}].")
        qkv = apply_linear(self.qkv, x).unflatten(-1, (3, self.num_heads, self.head_dim))
        window = self.window
        out = _PACKED[self.rank](
            qkv,
            window.kernel_size,
            stride=window.stride,
            dilation=window.dilation,
            is_causal=window.is_causal,
            scale=self.scale,
            rpb=self.rpb,
            dropout_p=self.attn_drop if self.training else 0,
        )
        return self.proj_drop(apply_linear(self.proj, out.flatten(-2)))

    def extra_repr(self) -> str:
        window = self.window
        parts = [f"{self.embed_dim}, num_heads={self.num_heads}, kernel_size={_short(window.kernel_size)}"]
        for name, plain in (("stride", 1), ("dilation", 1), ("is_causal", False)):
            entries = getattr(window, name)
            parts += [f"{name}={_short(entries)}"] if any(entry != plain for entry in entries) else []
        return ", ".join(parts + (["rel_pos_bias=True"] if self.rpb is not None else []))


def _short(entries: Sequence) -> object:
    return entries[0] if len(set(entries)) == 1 else tuple(entries)


class NeighborhoodAttention1D(_NeighborhoodAttention):
    __doc__ = (_NeighborhoodAttention.__doc__ or "").replace("*spatial", "length")
    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    __doc__ = (_NeighborhoodAttention.__doc__ or "").replace("*spatial", "height, width")
    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    __doc__ = (_NeighborhoodAttention.__doc__ or "").replace("*spatial", "depth, height, width")
    rank = 3


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): in training, whole samples of a residual branch become 0.

    The others are divided by the rate at which they are kept.
    """

    def __init__(self, rate: float):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop path rate {rate} must be in [0, 1).")
        self.rate = rate

    def forward(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        """``factors`` ``[batch]``: what to multiply the samples with; drawn if not given."""
        if not self.training or self.rate == 0:
            return x
        if factors is None:
            (factors,) = drop_path_factors([self.rate], x.dtype, torch.rand(1, x.shape[0], device=x.device))
        return x * factors.view(-1, *(1,) * (x.dim() - 1))

    def extra_repr(self) -> str:
        return f"{self.rate:.4g}"


def drop_path_factors(rates: Sequence[float], dtype: torch.dtype, numbers: Tensor) -> tuple[Tensor, ...]:
    """For each rate 0 for samples to drop, 1 / (1 - rate) for others; by numbers in [0, 1) ``[len(rates), ...]``."""
    keeps = [1 - rate for rate in rates]
    return tuple((own < keep).to(dtype).div(keep) for own, keep in zip(numbers, keeps, strict=True))
