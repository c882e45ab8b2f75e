"""NeighborhoodAttention3D of NATTEN 0.15: windows of one depth, and one height and width."""

from __future__ import annotations

from torch_nat.compat.natten.legacy.modules import LegacyNeighborhoodAttention

__all__ = ["NeighborhoodAttention3D"]


class NeighborhoodAttention3D(LegacyNeighborhoodAttention):
    """Neighbourhood attention on ``[batch, depth, height, width, dim]``; otherwise as in 2-D.

    ``kernel_size_d`` and ``dilation_d`` are those of the depth, and by default the others. Maps are padded
    along the depth as well (NATTEN forgot it, and failed).
    """

    rank = 3
    pads = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        kernel_size_d: int | None = None,
        dilation: int | None = 1,
        dilation_d: int | None = None,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.kernel_size, self.kernel_size_d = kernel_size, kernel_size_d or kernel_size
        self.dilation = dilation or 1
        self.dilation_d = dilation_d or self.dilation
        self.window_size = self.kernel_size * self.dilation
        self.window_size_d = self.kernel_size_d * self.dilation_d
        self._build(dim, num_heads, self._window()[0], bias, qkv_bias, qk_scale, attn_drop, proj_drop)

    def _window(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
        kernel_size = (self.kernel_size_d, self.kernel_size, self.kernel_size)
        return kernel_size, (self.dilation_d, self.dilation, self.dilation), (False,) * 3
