"""NeighborhoodAttention2D under the name of its file until 0.15."""

from torch_nat.compat.natten.v0_17.na2d import NeighborhoodAttention2D

__all__ = ["NeighborhoodAttention2D"]
