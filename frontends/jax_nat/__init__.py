"""Neighborhood Attention for JAX: functions under jit, grad and vmap, flax modules, and NAT models."""

try:
    import flax  # noqa: F401
    import jax  # noqa: F401
except ImportError as error:
    raise ImportError("jax_nat needs JAX and flax: pip install 'natcore[jax]'") from error

from jax_nat.functional import na1d, na1d_qkvpacked, na2d, na2d_qkvpacked, na3d, na3d_qkvpacked
from jax_nat.handler import TARGET, register_where_possible

__all__ = ["TARGET", "na1d", "na1d_qkvpacked", "na2d", "na2d_qkvpacked", "na3d", "na3d_qkvpacked"]

register_where_possible()
