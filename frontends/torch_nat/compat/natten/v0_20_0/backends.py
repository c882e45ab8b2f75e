"""NATTEN 0.20.0's backends by name. They are asked about one tensor, not about q, k and v."""

from __future__ import annotations

from torch import Tensor

from torch_nat.compat.natten.v0_21 import backends as current


def get_compatible_backends(input_tensor: Tensor, torch_compile: bool) -> list[str]:
    """What ``backend=`` of na1d, na2d and na3d may name on such tensors, in NATTEN's order of preference."""
    return current.get_compatible_backends(input_tensor, input_tensor, input_tensor, torch_compile)


def get_compatible_fmha_backends(input_tensor: Tensor, torch_compile: bool) -> list[str]:
    """What ``backend=`` of attention may name on such tensors, in NATTEN's order of preference."""
    return current.get_compatible_fmha_backends(input_tensor, input_tensor, input_tensor, False, False, torch_compile)


def choose_backend(input_tensor: Tensor, torch_compile: bool) -> str:
    """The first of `get_compatible_backends`. Raises NotImplementedError where there is none."""
    return current.choose_backend(input_tensor, input_tensor, input_tensor, torch_compile)


def choose_fmha_backend(input_tensor: Tensor, torch_compile: bool) -> str:
    """The first of `get_compatible_fmha_backends`. Raises NotImplementedError where there is none."""
    return current.choose_fmha_backend(input_tensor, input_tensor, input_tensor, False, False, torch_compile)


# Tile shapes to choose from: none, since torch_nat plans by itself.


def get_bwd_configs_for_cutlass_fmha(input_tensor: Tensor) -> list:
    return []


def get_bwd_configs_for_cutlass_fna(input_tensor: Tensor) -> list:
    return []


def get_configs_for_cutlass_blackwell_fmha(input_tensor: Tensor) -> list:
    return []


def get_configs_for_cutlass_blackwell_fna(input_tensor: Tensor) -> list:
    return []


def get_configs_for_cutlass_fmha(input_tensor: Tensor) -> list:
    return []


def get_configs_for_cutlass_fna(input_tensor: Tensor) -> list:
    return []


def get_configs_for_cutlass_hopper_fmha(input_tensor: Tensor) -> list:
    return []


def get_configs_for_cutlass_hopper_fna(input_tensor: Tensor) -> list:
    return []


def get_configs_for_flex_fmha(input_tensor: Tensor) -> list:
    return []


def get_configs_for_flex_fna(input_tensor: Tensor) -> list:
    return []
