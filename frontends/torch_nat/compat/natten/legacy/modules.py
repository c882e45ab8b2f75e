"""NeighborhoodAttention1D, 2D and 3D as until 0.17: ``rpb``, ``attn_drop`` and, until 0.15, padding.

Only attributes that NATTEN's own modules had are read, so that whole modules pickled under it load and
run. The scale multiplies q . k alone, the bias is added unscaled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_nat

_PACKED: dict[int, Any] = {1: torch_nat.na1d_qkvpacked, 2: torch_nat.na2d_qkvpacked, 3: torch_nat.na3d_qkvpacked}


class LegacyNeighborhoodAttention(nn.Module):
    """Forward of every old module; the constructors are the releases' own."""

    rank: int
    pads: bool  # whether a map smaller than the window is padded with zeros, as until 0.15

    def _build(
        self,
        dim: int,
        num_heads: int,
        kernel_size: tuple[int, ...],
        rel_pos_bias: bool,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
    ) -> None:
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}.")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.zeros(num_heads, *(2 * k - 1 for k in kernel_size)))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _window(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
        """kernel_size, dilation and is_causal, one entry per axis."""
        raise NotImplementedError

    def _window_on(self, spatial: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
        """The window on a map of that size; of another size nowhere but in 0.14.4."""
        return self._window()

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, *spatial, dim]`` to the same shape."""
        if x.dim() != self.rank + 2:
            raise ValueError(f"input has shape {tuple(x.shape)}; expected {self.rank + 2} axes, channels last.")
        spatial = tuple(x.shape[1:-1])
        kernel_size, dilation, is_causal = self._window_on(spatial)
        if self.pads:
            x = _padded(x, [k * d for k, d in zip(kernel_size, dilation, strict=True)])
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        window = dict(dilation=dilation, is_causal=is_causal)
        dropout_p = self.attn_drop.p if self.training else 0.0
        out = _PACKED[self.rank](qkv, kernel_size, **window, scale=self.scale, rpb=self.rpb, dropout_p=dropout_p)
        out = out.flatten(-2)
        for axis, extent in enumerate(spatial, 1):
            out = out.narrow(axis, 0, extent)
        return self.proj_drop(self.proj(out))

    def extra_repr(self) -> str:
        names = ("kernel_size_d", "dilation_d", "kernel_size", "dilation", "is_causal")
        given = [f"{name}={getattr(self, name)}" for name in names if hasattr(self, name)]
        heads = [f"head_dim={self.head_dim}, num_heads={self.num_heads}"]
        return ", ".join([*heads, *given, f"has_bias={self.rpb is not None}"])


def _padded(x: Tensor, reach: list[int]) -> Tensor:
    """Zeros after the end of every axis that is shorter than its window. They are attended to, unmasked."""
    missing = [max(least - extent, 0) for least, extent in zip(reach, x.shape[1:-1], strict=True)]
    if not any(missing):
        return x
    return F.pad(x, (0, 0, *(amount for axis in reversed(missing) for amount in (0, axis))))
