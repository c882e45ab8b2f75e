"""NATTEN's backends by name, as asked from 0.20.1 to 0.21.1: attention is neither causal nor over packed sequences."""

from __future__ import annotations

from torch import Tensor

from torch_nat.compat.natten.v0_21 import backends as current
from torch_nat.compat.natten.v0_21.backends import (
    can_run_cutlass_blackwell_fna,
    can_run_cutlass_fna,
    can_run_cutlass_hopper_fna,
    choose_backend,
    get_bwd_configs_for_cutlass_fmha,
    get_bwd_configs_for_cutlass_fna,
    get_compatible_backends,
    get_configs_for_cutlass_blackwell_fmha,
    get_configs_for_cutlass_blackwell_fna,
    get_configs_for_cutlass_fmha,
    get_configs_for_cutlass_fna,
    get_configs_for_cutlass_hopper_fmha,
    get_configs_for_cutlass_hopper_fna,
    get_configs_for_flex_fmha,
    get_configs_for_flex_fna,
)

__all__ = [
    "can_run_cutlass_blackwell_fmha",
    "can_run_cutlass_blackwell_fna",
    "can_run_cutlass_fmha",
    "can_run_cutlass_fna",
    "can_run_cutlass_hopper_fmha",
    "can_run_cutlass_hopper_fna",
    "can_run_flex_attention",
    "choose_backend",
    "choose_fmha_backend",
    "get_bwd_configs_for_cutlass_fmha",
    "get_bwd_configs_for_cutlass_fna",
    "get_compatible_backends",
    "get_compatible_fmha_backends",
    "get_configs_for_cutlass_blackwell_fmha",
    "get_configs_for_cutlass_blackwell_fna",
    "get_configs_for_cutlass_fmha",
    "get_configs_for_cutlass_fna",
    "get_configs_for_cutlass_hopper_fmha",
    "get_configs_for_cutlass_hopper_fna",
    "get_configs_for_flex_fmha",
    "get_configs_for_flex_fna",
]


def get_compatible_fmha_backends(query: Tensor, key: Tensor, value: Tensor, torch_compile: bool) -> list[str]:
    """What ``backend=`` of attention may name on these tensors, in NATTEN's order of preference."""
    return current.get_compatible_fmha_backends(query, key, value, False, False, torch_compile)


def choose_fmha_backend(query: Tensor, key: Tensor, value: Tensor, torch_compile: bool) -> str:
    """The first of `get_compatible_fmha_backends`. Raises NotImplementedError where there is none."""
    return current.choose_fmha_backend(query, key, value, False, False, torch_compile)


def can_run_cutlass_fmha(query: Tensor, key: Tensor, value: Tensor, raise_error: bool = False) -> bool:
    return current.can_run_cutlass_fmha(query, key, value, False, False, raise_error)


def can_run_cutlass_hopper_fmha(query: Tensor, key: Tensor, value: Tensor, raise_error: bool = False) -> bool:
    return current.can_run_cutlass_hopper_fmha(query, key, value, False, False, raise_error)


def can_run_cutlass_blackwell_fmha(query: Tensor, key: Tensor, value: Tensor, raise_error: bool = False) -> bool:
    return current.can_run_cutlass_blackwell_fmha(query, key, value, False, False, raise_error)


def can_run_flex_attention(
    query: Tensor, key: Tensor, value: Tensor, torch_compile: bool, raise_error: bool = False
) -> bool:
    return current.can_run_flex_attention(query, key, value, torch_compile, raise_error=raise_error)
