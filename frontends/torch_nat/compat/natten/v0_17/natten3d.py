"""NeighborhoodAttention3D under the name of its file until 0.15."""

from torch_nat.compat.natten.v0_17.na3d import NeighborhoodAttention3D

__all__ = ["NeighborhoodAttention3D"]
