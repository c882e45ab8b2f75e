"""torch_nat: neighbourhood attention and the NAT models for PyTorch."""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("torch_nat needs PyTorch: pip install 'natcore[torch]'") from error

from torch_nat.functional import na1d, na1d_qkvpacked, na2d, na2d_qkvpacked, na3d, na3d_qkvpacked

__all__ = [
    "na1d",
    "na1d_qkvpacked",
    "na2d",
    "na2d_qkvpacked",
    "na3d",
    "na3d_qkvpacked",
]
