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
from natcore.api_unfused import (
    na1d_av,
    na1d_av_backward,
    na1d_qk,
    na1d_qk_backward,
    na2d_av,
    na2d_av_backward,
    na2d_qk,
    na2d_qk_backward,
    na3d_av,
    na3d_av_backward,
    na3d_qk,
    na3d_qk_backward,
)
from natcore.merging import merge_attentions
from natcore.planning import Config
from natcore.problem import Gradients, Window
from natcore.unfused import AVGradients, QKGradients

__version__ = "0.1.0"

__all__ = [
    "AVGradients",
    "Config",
    "Gradients",
    "QKGradients",
    "Window",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_av_backward",
    "na1d_backward",
    "na1d_qk",
    "na1d_qk_backward",
    "na1d_qkvpacked",
    "na2d",
    "na2d_av",
    "na2d_av_backward",
    "na2d_backward",
    "na2d_qk",
    "na2d_qk_backward",
    "na2d_qkvpacked",
    "na3d",
    "na3d_av",
    "na3d_av_backward",
    "na3d_backward",
    "na3d_qk",
    "na3d_qk_backward",
    "na3d_qkvpacked",
]
