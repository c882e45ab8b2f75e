"""NeighborhoodAttention2D of NATTEN 0.14 and 0.15: a bias by default, maps padded to the window."""

from __future__ import annotations

from torch_nat.compat.natten.legacy.modules import LegacyNeighborhoodAttention

__all__ = ["NeighborhoodAttention2D"]


class NeighborhoodAttention2D(LegacyNeighborhoodAttention):
    """Neighbourhood attention on ``[batch, height, width, dim]``.

    A map smaller than kernel_size * dilation is padded with zeros at its end before the projection, and
    cut off afterwards. Parameters: ``qkv``, ``proj`` and, with ``bias``, ``rpb``.
    """

    rank = 2
    pads = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int | None = 1,
        bias: bool = True,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.kernel_size, self.dilation = kernel_size, dilation or 1
        self.window_size = self.kernel_size * self.dilation
        self._build(dim, num_heads, (kernel_size,) * 2, bias, qkv_bias, qk_scale, attn_drop, proj_drop)

    def _window(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
        return (self.kernel_size,) * 2, (self.dilation,) * 2, (False,) * 2
