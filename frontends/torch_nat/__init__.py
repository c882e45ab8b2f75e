"""torch_nat: neighbourhood attention and the NAT models for PyTorch."""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("torch_nat needs PyTorch: pip install 'natcore[torch]'") from error

from torch_nat.checkpoints import load, published_state_dict, save
from torch_nat.functional import na1d, na1d_qkvpacked, na2d, na2d_qkvpacked, na3d, na3d_qkvpacked
from torch_nat.layers import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from torch_nat.models import NAT, create_model
from torch_nat.unfused import merge_attentions, na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk

__all__ = [
    "NAT",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "create_model",
    "load",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na1d_qkvpacked",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na2d_qkvpacked",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "na3d_qkvpacked",
    "published_state_dict",
    "save",
]
