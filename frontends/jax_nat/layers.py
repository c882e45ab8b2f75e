"""Neighbourhood attention as flax.nnx modules, with the parameter names of the published NAT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jax_nat.functional import PerAxis, PerAxisFlag, na1d_qkvpacked, na2d_qkvpacked, na3d_qkvpacked
from natcore.problem import Window

_PACKED: dict[int, Callable[..., Any]] = {1: na1d_qkvpacked, 2: na2d_qkvpacked, 3: na3d_qkvpacked}

#: The published initialisation of linear layers and bias tables, a normal cut at 100 standard deviations.
published_init = nnx.initializers.normal(0.02)


def dropout(rate: float, rngs: nnx.Rngs, broadcast_dims: tuple[int, ...] = ()) -> nnx.Dropout:
    """Dropout that keeps a random state only where it draws from it."""
    if not 0 <= rate < 1:
        raise ValueError(f"drop rate {rate} must be in [0, 1).")
    return nnx.Dropout(rate, broadcast_dims=broadcast_dims, rngs=rngs if rate else None)


class _NeighborhoodAttention(nnx.Module):
    """Multi-head neighbourhood attention on channels-last maps, ``[batch, *spatial, embed_dim]``.

    Parameters: ``qkv`` and ``proj`` (linear, initialised as in the published NAT: normal of std 0.02,
    bias 0) and, with ``rel_pos_bias``, ``rpb`` ``[num_heads, 2 * k0 - 1, ...]``. As in the published
    code, the scale goes on q . k alone and the bias is added unscaled (the paper's formula divides it
    too).

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
        attn_drop: dropout rate of the attention weights (`jax_nat.na2d`'s dropout_p), unless ``eval`` was called.
        proj_drop: dropout rate after the output projection.
        dtype: of the computation; by default the promoted dtype of input and parameters.
        rngs: random streams ``params`` and, with dropout, ``dropout``.

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
        *,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ) -> None:
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}.")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.window = Window.of(self.rank, kernel_size, stride, dilation, is_causal)
        self.scale = qk_scale
        common: dict[str, Any] = {"kernel_init": published_init, "dtype": dtype, "rngs": rngs}
        self.qkv = nnx.Linear(embed_dim, 3 * embed_dim, use_bias=qkv_bias, **common)
        table = (num_heads, *self.window.rpb_shape)
        self.rpb = nnx.Param(published_init(rngs.params(), table, jnp.float32)) if rel_pos_bias else None
        self.proj = nnx.Linear(embed_dim, embed_dim, **common)
        self.attn_drop = dropout(attn_drop, rngs)
        self.proj_drop = dropout(proj_drop, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[batch, *spatial, embed_dim]`` to the same shape."""
        if x.ndim != self.rank + 2 or x.shape[-1] != self.embed_dim:
            axes = ", ".join(f"axis{a}" for a in range(self.rank))
            raise ValueError(f"input has shape {x.shape}; expected [batch, {axes}, {self.embed_dim}].")
        qkv = self.qkv(x).reshape((*x.shape[:-1], 3, self.num_heads, self.head_dim))
        rpb = None if self.rpb is None else self.rpb[...]
        if rpb is not None and rpb.dtype != qkv.dtype:
            rpb = rpb.astype(jnp.float32)
        drop = self.attn_drop
        keys = None if drop.rate == 0 or drop.deterministic else drop.rngs
        out = _PACKED[self.rank](
            qkv,
            self.window.kernel_size,
            stride=self.window.stride,
            dilation=self.window.dilation,
            is_causal=self.window.is_causal,
            scale=self.scale,
            rpb=rpb,
            dropout_p=0.0 if keys is None else drop.rate,
            dropout_seed=None if keys is None else jax.random.bits(keys(), dtype="uint32"),
        )
        return self.proj_drop(self.proj(out.reshape(x.shape)))


class NeighborhoodAttention1D(_NeighborhoodAttention):
    __doc__ = (_NeighborhoodAttention.__doc__ or "").replace("*spatial", "length")
    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    __doc__ = (_NeighborhoodAttention.__doc__ or "").replace("*spatial", "height, width")
    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    __doc__ = (_NeighborhoodAttention.__doc__ or "").replace("*spatial", "depth, height, width")
    rank = 3
