"""NeighborhoodAttention2D of NATTEN 0.17."""

from torch_nat.compat.natten.v0_17._module import NeighborhoodAttention

__all__ = ["NeighborhoodAttention2D"]


class NeighborhoodAttention2D(NeighborhoodAttention):
    __doc__ = (NeighborhoodAttention.__doc__ or "").replace("*spatial", "height, width")
    rank = 2
