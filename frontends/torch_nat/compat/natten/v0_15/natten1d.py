"""NeighborhoodAttention1D of NATTEN 0.15: that of 0.14."""

from torch_nat.compat.natten.v0_14.natten1d import NeighborhoodAttention1D

__all__ = ["NeighborhoodAttention1D"]
