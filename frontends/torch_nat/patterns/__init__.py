"""The relatives of neighbourhood attention, expressed through its kernels: ViT, Swin, SASA and HaloNet.

Each takes and gives heads-last tensors and is differentiable, in 1, 2 or 3 dimensions, on every device and in
every dtype of `torch_nat.na2d`; nothing here forms a matrix of scores. The layers have the parameters of
`torch_nat.NeighborhoodAttention2D`, so one may stand in for another in a model.
"""

from torch_nat.patterns.functional import Border, halo_attention, sasa, self_attention, swin_rpb, window_attention
from torch_nat.patterns.layers import HaloAttention2D, StandAloneAttention2D, WindowAttention2D

__all__ = [
    "Border",
    "HaloAttention2D",
    "StandAloneAttention2D",
    "WindowAttention2D",
    "halo_attention",
    "sasa",
    "self_attention",
    "swin_rpb",
    "window_attention",
]
