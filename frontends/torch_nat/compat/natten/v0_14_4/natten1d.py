"""NeighborhoodAttention1D of NATTEN 0.14.2 and 0.14.4: kernel_size comes before num_heads, dilation last."""

from __future__ import annotations

from torch_nat.compat.natten.v0_14 import natten1d as later

__all__ = ["NeighborhoodAttention1D"]


class NeighborhoodAttention1D(later.NeighborhoodAttention1D):
    """Neighbourhood attention on ``[batch, length, dim]``, always with a bias; maps are padded to the window.

    A ``dilation`` that is a string is as large as the shortest axis of each map allows.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dilation: int | str | None = None,
    ):
        fixed = None if isinstance(dilation, str) else dilation
        super().__init__(dim, num_heads, kernel_size, fixed, True, qkv_bias, qk_scale, attn_drop, proj_drop)
        if isinstance(dilation, str):
            self.dilation = self.window_size = None

    def _window_on(self, spatial: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
        if self.dilation is not None:
            return self._window()
        dilation = max(min(spatial) // self.kernel_size, 1)
        return (self.kernel_size,) * 1, (dilation,) * 1, (False,) * 1
