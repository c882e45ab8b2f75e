"""The constructor of the modules of NATTEN 0.17."""

from __future__ import annotations

from torch_nat.compat.natten.legacy.modules import LegacyNeighborhoodAttention
from torch_nat.compat.natten.legacy.unfused import PerAxis
from torch_nat.compat.natten.v0_17.utils.checks import check_all_args


class NeighborhoodAttention(LegacyNeighborhoodAttention):
    """Neighbourhood attention on ``[batch, *spatial, dim]``. A map must be at least kernel_size * dilation.

    Parameters: ``qkv``, ``proj`` and, with ``rel_pos_bias`` (which goes with causal axes too), ``rpb``.
    ``attn_drop`` drops attention weights whether or not fused attention is switched on (NATTEN's fused
    attention did not). ``use_experimental_ops`` changes nothing: every operation compiles.
    """

    pads = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: PerAxis,
        dilation: PerAxis = 1,
        is_causal: bool | tuple[bool, ...] = False,
        rel_pos_bias: bool = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        use_experimental_ops: bool = False,
    ):
        super().__init__()
        self.kernel_size, self.dilation, self.is_causal = check_all_args(self.rank, kernel_size, dilation, is_causal)
        self.attn_drop_rate, self.use_experimental_ops = attn_drop, use_experimental_ops
        self._build(dim, num_heads, self.kernel_size, rel_pos_bias, qkv_bias, qk_scale, attn_drop, proj_drop)

    def _window(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
        return self.kernel_size, self.dilation, self.is_causal
