"""NeighborhoodAttention3D of NATTEN 0.17."""

from torch_nat.compat.natten.v0_17._module import NeighborhoodAttention

__all__ = ["NeighborhoodAttention3D"]


class NeighborhoodAttention3D(NeighborhoodAttention):
    __doc__ = (NeighborhoodAttention.__doc__ or "").replace("*spatial", "depth, height, width")
    rank = 3
