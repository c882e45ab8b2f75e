"""NATTEN's backends by name: which may be asked for on given tensors."""

from __future__ import annotations

from torch import Tensor

from torch_nat.compat.natten.v0_21.backends.configs import (
    get_bwd_configs_for_cutlass_blackwell_fmha,
    get_bwd_configs_for_cutlass_blackwell_fna,
    get_bwd_configs_for_cutlass_fmha,
    get_bwd_configs_for_cutlass_fna,
    get_bwd_configs_for_cutlass_hopper_fmha,
    get_bwd_configs_for_cutlass_hopper_fna,
    get_configs_for_cutlass_blackwell_fmha,
    get_configs_for_cutlass_blackwell_fna,
    get_configs_for_cutlass_fmha,
    get_configs_for_cutlass_fna,
    get_configs_for_cutlass_hopper_fmha,
    get_configs_for_cutlass_hopper_fna,
    get_configs_for_flex_fmha,
    get_configs_for_flex_fna,
)
from torch_nat.compat.natten.v0_21.backends.configs.checks import (
    can_run_cutlass_blackwell_fmha,
    can_run_cutlass_blackwell_fna,
    can_run_cutlass_fmha,
    can_run_cutlass_fna,
    can_run_cutlass_hopper_fmha,
    can_run_cutlass_hopper_fna,
    can_run_flex_attention,
)
from torch_nat.compat.natten.v0_21.backends.kernels import (
    cutlass_blackwell_fmha,
    cutlass_blackwell_fna_generic,
    cutlass_fmha,
    cutlass_fna_generic,
    cutlass_hopper_fmha,
    cutlass_hopper_fna_generic,
    flex_fmha,
    flex_fna_generic,
    na1d_cutlass_blackwell_fna,
    na1d_cutlass_fna,
    na1d_cutlass_hopper_fna,
    na1d_flex,
    na2d_cutlass_blackwell_fna,
    na2d_cutlass_fna,
    na2d_cutlass_hopper_fna,
    na2d_flex,
    na3d_cutlass_blackwell_fna,
    na3d_cutlass_fna,
    na3d_cutlass_hopper_fna,
    na3d_flex,
)


def get_compatible_backends(query: Tensor, key: Tensor, value: Tensor, torch_compile: bool) -> list[str]:
    """What ``backend=`` of na1d, na2d and na3d may name on these tensors, in NATTEN's order of preference."""
    tensors = (query, key, value)
    answers = {
        "blackwell-fna": can_run_cutlass_blackwell_fna(*tensors),
        "hopper-fna": can_run_cutlass_hopper_fna(*tensors),
        "cutlass-fna": can_run_cutlass_fna(*tensors),
        "flex-fna": can_run_flex_attention(*tensors, torch_compile=torch_compile),
    }
    return [name for name, runs in answers.items() if runs]


def get_compatible_fmha_backends(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, is_varlen: bool, torch_compile: bool
) -> list[str]:
    """What ``backend=`` of attention may name on these tensors, in NATTEN's order of preference."""
    tensors = (query, key, value)
    answers = {
        "blackwell-fmha": can_run_cutlass_blackwell_fmha(*tensors, is_causal=is_causal, is_varlen=is_varlen),
        "hopper-fmha": can_run_cutlass_hopper_fmha(*tensors, is_causal=is_causal, is_varlen=is_varlen),
        "cutlass-fmha": can_run_cutlass_fmha(*tensors, is_causal=is_causal, is_varlen=is_varlen),
        "flex-fmha": can_run_flex_attention(*tensors, torch_compile=torch_compile),
    }
    return [name for name, runs in answers.items() if runs]


def choose_backend(query: Tensor, key: Tensor, value: Tensor, torch_compile: bool) -> str:
    """The first of `get_compatible_backends`. Raises NotImplementedError where there is none."""
    return _first(get_compatible_backends(query, key, value, torch_compile), query)


def choose_fmha_backend(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, is_varlen: bool, torch_compile: bool
) -> str:
    """The first of `get_compatible_fmha_backends`. Raises NotImplementedError where there is none."""
    return _first(get_compatible_fmha_backends(query, key, value, is_causal, is_varlen, torch_compile), query)


def _first(names: list[str], query: Tensor) -> str:
    if not names:
        raise NotImplementedError(f"{query.dtype} on {query.device} of shape {tuple(query.shape)} is not supported.")
    return names[0]


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
    "cutlass_blackwell_fmha",
    "cutlass_blackwell_fna_generic",
    "cutlass_fmha",
    "cutlass_fna_generic",
    "cutlass_hopper_fmha",
    "cutlass_hopper_fna_generic",
    "flex_fmha",
    "flex_fna_generic",
    "get_bwd_configs_for_cutlass_blackwell_fmha",
    "get_bwd_configs_for_cutlass_blackwell_fna",
    "get_bwd_configs_for_cutlass_fmha",
    "get_bwd_configs_for_cutlass_fna",
    "get_bwd_configs_for_cutlass_hopper_fmha",
    "get_bwd_configs_for_cutlass_hopper_fna",
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
    "na1d_cutlass_blackwell_fna",
    "na1d_cutlass_fna",
    "na1d_cutlass_hopper_fna",
    "na1d_flex",
    "na2d_cutlass_blackwell_fna",
    "na2d_cutlass_fna",
    "na2d_cutlass_hopper_fna",
    "na2d_flex",
    "na3d_cutlass_blackwell_fna",
    "na3d_cutlass_fna",
    "na3d_cutlass_hopper_fna",
    "na3d_flex",
]
