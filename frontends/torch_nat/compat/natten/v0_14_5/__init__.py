"""The interface of NATTEN 0.14.5, answered by torch_nat. See `torch_nat.compat.natten`."""

from torch_nat.compat.natten.v0_14 import natten1d, natten2d
from torch_nat.compat.natten.v0_14.natten1d import NeighborhoodAttention1D
from torch_nat.compat.natten.v0_14.natten2d import NeighborhoodAttention2D
from torch_nat.compat.natten.v0_14_5 import functional

__version__ = "0.14.5"

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "functional", "natten1d", "natten2d"]
