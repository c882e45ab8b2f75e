"""The interface of NATTEN 0.15, answered by torch_nat. See `torch_nat.compat.natten`."""

from torch_nat.compat.natten.v0_15 import functional, natten1d, natten2d, natten3d, utils
from torch_nat.compat.natten.v0_15.functional import (
    disable_gemm_na,
    disable_tf32,
    disable_tiled_na,
    enable_gemm_na,
    enable_tf32,
    enable_tiled_na,
    has_bfloat,
    has_cuda,
    has_fp32_gemm,
    has_fp64_gemm,
    has_gemm,
    has_half,
    has_tf32_gemm,
)
from torch_nat.compat.natten.v0_15.natten1d import NeighborhoodAttention1D
from torch_nat.compat.natten.v0_15.natten2d import NeighborhoodAttention2D
from torch_nat.compat.natten.v0_15.natten3d import NeighborhoodAttention3D

__version__ = "0.15.1"

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "disable_gemm_na",
    "disable_tf32",
    "disable_tiled_na",
    "enable_gemm_na",
    "enable_tf32",
    "enable_tiled_na",
    "functional",
    "has_bfloat",
    "has_cuda",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_gemm",
    "has_half",
    "has_tf32_gemm",
    "natten1d",
    "natten2d",
    "natten3d",
    "utils",
]
