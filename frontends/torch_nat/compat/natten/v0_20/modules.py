"""NeighborhoodAttention1D, 2D and 3D of NATTEN 0.20.1, which 0.21 kept."""

from torch_nat.compat.natten.v0_21.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    NeighborhoodAttentionGeneric,
)

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "NeighborhoodAttentionGeneric",
]
