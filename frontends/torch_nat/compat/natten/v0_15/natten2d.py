"""NeighborhoodAttention2D of NATTEN 0.15: that of 0.14."""

from torch_nat.compat.natten.v0_14.natten2d import NeighborhoodAttention2D

__all__ = ["NeighborhoodAttention2D"]
