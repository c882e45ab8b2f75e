"""What the GPU can do, as old releases were asked; and switches between kernels that are not here.

The switches keep what was set, so that it can be read back. None of them changes a result: torch_nat
chooses kernels itself and computes float32 in float32.
"""

from __future__ import annotations

import torch


class Switches:
    """NATTEN's process-wide choice of unfused kernels."""

    tf32: bool = False
    tiled: bool = True
    gemm: bool = True


def get_device_cc(device_index: int | torch.device | None = None) -> int:
    """10 * major + minor of the compute capability; 0 without a CUDA device."""
    if not has_cuda():
        return 0
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


def has_cuda() -> bool:
    return torch.cuda.is_available()


def has_half(device_index: int | torch.device | None = None) -> bool:
    return get_device_cc(device_index) >= 60


def has_bfloat(device_index: int | torch.device | None = None) -> bool:
    return get_device_cc(device_index) >= 80


def has_gemm(device_index: int | torch.device | None = None) -> bool:
    return get_device_cc(device_index) >= 70


def has_tf32_gemm(device_index: int | torch.device | None = None) -> bool:
    return get_device_cc(device_index) >= 80


has_fp32_gemm = has_fp64_gemm = has_tf32_gemm


def has_fna(device_index: int | torch.device | None = None) -> bool:
    """Fused kernels; on the CPU there are some too, but callers ask about the GPU."""
    return get_device_cc(device_index) >= 50


has_fused_na = has_fna


def use_tf32_in_gemm_na(mode: bool = True) -> None:
    Switches.tf32 = mode


def is_tf32_in_gemm_na_enabled() -> bool:
    return Switches.tf32


def use_tiled_na(mode: bool = True) -> None:
    Switches.tiled = mode


def is_tiled_na_enabled() -> bool:
    return Switches.tiled


def use_gemm_na(mode: bool = True) -> None:
    Switches.gemm = mode


def is_gemm_na_enabled() -> bool:
    return Switches.gemm


def enable_tf32() -> bool:
    Switches.tf32 = True
    return Switches.tf32


def disable_tf32() -> bool:
    Switches.tf32 = False
    return Switches.tf32


def enable_gemm_na() -> bool:
    Switches.gemm = True
    return Switches.gemm


def disable_gemm_na() -> bool:
    Switches.gemm = False
    return Switches.gemm


def enable_tiled_na() -> bool:
    Switches.tiled = True
    return Switches.tiled


def disable_tiled_na() -> bool:
    Switches.tiled = False
    return Switches.tiled
