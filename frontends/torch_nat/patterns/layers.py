"""The relatives as layers on channels-last maps, with the parameters of NeighborhoodAttention2D."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from natcore.window import per_axis
from torch_nat.functional import PerAxis
from torch_nat.layers import NeighborhoodAttention2D
from torch_nat.patterns.functional import Border, halo_attention, sasa, window_attention


class _Pattern2D(NeighborhoodAttention2D):
    """Projections, bias table and checks are those of the base; ``attend`` is the pattern."""

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, height, width, embed_dim]`` to the same shape."""
        if x.dim() != 4 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"input has shape {tuple(x.shape)}; expected [batch, height, width, {self.embed_dim}].")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        return self.proj_drop(self.proj(self.attend(q, k, v).flatten(-2)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Heads-last ``[batch, height, width, num_heads, head_dim]`` to the same shape."""
        raise NotImplementedError


class WindowAttention2D(_Pattern2D):
    """Swin's W-MSA and, with a shift, SW-MSA (Liu et al., ICCV 2021); see `window_attention`.

    As in its code for detection, a map that is no multiple of the window gets zeros, right and bottom, before the
    projection; they are attended to like any token and cut off afterwards. An axis of one window is not shifted.

    Args:
        embed_dim, num_heads: channels, and attention heads that divide them.
        window_size: an int or one per axis.
        shift: from 0 to window - 1; Swin's is window // 2 in every second block.
        options: rel_pos_bias, qkv_bias, qk_scale and proj_drop of `NeighborhoodAttention2D`.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, window_size: PerAxis, shift: PerAxis = 0, **options: Any
    ) -> None:
        super().__init__(embed_dim, num_heads, window_size, stride=window_size, **options)
        self.shift = per_axis("shift", shift, 2, int)
        if any(not 0 <= start < size for start, size in zip(self.shift, self.window.kernel_size, strict=True)):
            raise ValueError(f"shift {self.shift} must be at least 0 and less than window {self.window.kernel_size}.")

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        bottom, right = (-extent % size for extent, size in zip((height, width), self.window.kernel_size, strict=True))
        if not bottom and not right:
            return super().forward(x)
        return super().forward(F.pad(x, (0, 0, 0, right, 0, bottom)))[:, :height, :width]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = self.window.kernel_size
        sizes = zip(self.shift, window, q.shape[1:3], strict=True)
        shift = [start if extent > size else 0 for start, size, extent in sizes]
        return window_attention(q, k, v, window, shift, scale=self.scale, rpb=self.rpb)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, shift={self.shift}"


class StandAloneAttention2D(_Pattern2D):
    """SASA (Ramachandran et al., NeurIPS 2019) with a scalar bias per offset; see `sasa`.

    Args:
        embed_dim, num_heads: channels, and attention heads that divide them.
        kernel_size: an int or one per axis.
        border: what is beyond the map, "zeros" or "mask".
        options: rel_pos_bias, qkv_bias, qk_scale and proj_drop of `NeighborhoodAttention2D`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: PerAxis,
        border: Literal["zeros", "mask"] = "zeros",
        **options: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, kernel_size, **options)
        self.border: Literal["zeros", "mask"] = border

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sasa(q, k, v, self.window.kernel_size, border=self.border, scale=self.scale, rpb=self.rpb)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, border={self.border}"


class HaloAttention2D(_Pattern2D):
    """HaloNet's attention (Vaswani et al., CVPR 2021) with a scalar bias per offset; see `halo_attention`.

    Args:
        embed_dim, num_heads: channels, and attention heads that divide them.
        block, halo: an int or one per axis.
        border: what is beyond the map: "zeros", "mask" or "shift".
        options: rel_pos_bias, qkv_bias, qk_scale and proj_drop of `NeighborhoodAttention2D`.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, block: PerAxis, halo: PerAxis, border: Border = "zeros", **options: Any
    ) -> None:
        blocks, halos = per_axis("block", block, 2, int), per_axis("halo", halo, 2, int)
        window = tuple(b + 2 * h for b, h in zip(blocks, halos, strict=True))
        super().__init__(embed_dim, num_heads, window, stride=blocks, **options)
        self.block, self.halo = blocks, halos
        self.border: Border = border

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return halo_attention(q, k, v, self.block, self.halo, border=self.border, scale=self.scale, rpb=self.rpb)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block={self.block}, halo={self.halo}, border={self.border}"
