"""NeighborhoodAttention1D under the name of its file until 0.15."""

from torch_nat.compat.natten.v0_17.na1d import NeighborhoodAttention1D

__all__ = ["NeighborhoodAttention1D"]
