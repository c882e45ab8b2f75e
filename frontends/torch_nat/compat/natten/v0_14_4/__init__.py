"""The interface of NATTEN 0.14.2 and 0.14.4, answered by torch_nat. See `torch_nat.compat.natten`."""

from torch_nat.compat.natten.v0_14_4 import functional, natten1d, natten2d
from torch_nat.compat.natten.v0_14_4.natten1d import NeighborhoodAttention1D
from torch_nat.compat.natten.v0_14_4.natten2d import NeighborhoodAttention, NeighborhoodAttention2D

__version__ = "0.14.4"

__all__ = [
    "NeighborhoodAttention",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "functional",
    "natten1d",
    "natten2d",
]
