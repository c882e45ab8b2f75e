"""Neighborhood Attention for JAX: functions under jit, grad and vmap, flax modules, and NAT models."""

try:
    import flax  # noqa: F401
    import jax  # noqa: F401
except ImportError as error:
    raise ImportError("jax_nat needs JAX and flax: pip install 'natcore[jax]'") from error

from jax_nat.checkpoints import load, save
from jax_nat.functional import na1d, na1d_qkvpacked, na2d, na2d_qkvpacked, na3d, na3d_qkvpacked
from jax_nat.handler import TARGET, register_where_possible
from jax_nat.layers import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from jax_nat.models import NAT, create_model
from jax_nat.unfused import merge_attentions, na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk

__all__ = [
    "NAT",
    "TARGET",
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
    "save",
]

register_where_possible()
