"""NeighborhoodAttention1D of NATTEN 0.17."""

from torch_nat.compat.natten.v0_17._module import NeighborhoodAttention

__all__ = ["NeighborhoodAttention1D"]


class NeighborhoodAttention1D(NeighborhoodAttention):
    __doc__ = (NeighborhoodAttention.__doc__ or "").replace("*spatial", "length")
    rank = 1
