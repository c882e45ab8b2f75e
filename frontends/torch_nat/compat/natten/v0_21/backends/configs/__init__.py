"""Tile shapes to choose from: none, since torch_nat plans by itself.

NATTEN too answers with an empty list where a backend cannot be tuned on the given tensors.
"""

from __future__ import annotations

from torch import Tensor


def get_configs_for_cutlass_fna(query: Tensor, key: Tensor, value: Tensor) -> list:
    return []


def get_bwd_configs_for_cutlass_fna(query: Tensor, key: Tensor, value: Tensor) -> list:
    return []


def get_configs_for_cutlass_fmha(query: Tensor, key: Tensor, value: Tensor) -> list:
    return []


def get_bwd_configs_for_cutlass_fmha(query: Tensor, key: Tensor, value: Tensor) -> list:
    return []


def get_configs_for_cutlass_hopper_fna(query: Tensor, key: Tensor, value: Tensor) -> list:
    return []


def get_bwd_configs_for_cutlass_hopper_fna(query: Tensor, key: Tensor, value: Tensor) -> list:
    return []


def get_configs_for_cutlass_hopper_fmha(query: Tensor, key: Tensor, value: Tensor) -> list:
    return []


def get_bwd_configs_for_cutlass_hopper_fmha(query: Tensor, key: Tensor, value: Tensor) -> list:
    return []


def get_configs_for_cutlass_blackwell_fna(query: Tensor, key: Tensor, value: Tensor) -> list:
    return []


def get_bwd_configs_for_cutlass_blackwell_fna(query: Tensor, key: Tensor, value: Tensor) -> list:
    return []


def get_configs_for_cutlass_blackwell_fmha(query: Tensor, key: Tensor, value: Tensor) -> list:
    return []


def get_bwd_configs_for_cutlass_blackwell_fmha(query: Tensor, key: Tensor, value: Tensor) -> list:
    return []


def get_configs_for_flex_fna(query: Tensor, key: Tensor, value: Tensor, torch_compile: bool = False) -> list:
    return []


def get_configs_for_flex_fmha(query: Tensor, key: Tensor, value: Tensor, torch_compile: bool = False) -> list:
    return []
