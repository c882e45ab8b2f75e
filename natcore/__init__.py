"""natcore: Neighborhood Attention on raw arrays, on CPU and CUDA. See `na2d`."""

from natcore.api import (
    na1d,
    na1d_backward,
    na1d_qkvpacked,
    na2d,
    na2d_backward,
    na2d_qkvpacked,
    na3d,
    na3d_backward,
    na3d_qkvpacked,
)
from natcore.planning import Config
from natcore.problem import Gradients, Window

__version__ = "0.1.0"

__all__ = [
    "Config",
    "Gradients",
    "Window",
    "na1d",
    "na1d_backward",
    "na1d_qkvpacked",
    "na2d",
    "na2d_backward",
    "na2d_qkvpacked",
    "na3d",
    "na3d_backward",
    "na3d_qkvpacked",
]
