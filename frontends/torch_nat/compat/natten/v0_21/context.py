"""NATTEN's process-wide switches: kept so that callers can set and read them. None changes a result.

torch_nat's backward gathers, so it is deterministic without asking; there is no KV parallelism to
allow, no memory to trade for it and no Flex Attention to compile.
"""

from __future__ import annotations

from enum import Enum

import torch

from torch_nat.compat.natten.v0_21.utils.log import get_logger

logger = get_logger(__name__)


class MemoryUsagePreference(Enum):
    Default = 0
    Strict = 1
    Unrestricted = 2


class NattenContext:
    """The state of the switches."""

    is_deterministic_mode_enabled: bool = False
    is_kv_parallelism_enabled: bool = True
    training_memory_preference: MemoryUsagePreference = MemoryUsagePreference.Default
    flex_compile_allowed: bool = False
    flex_compile_backprop_allowed: bool = False

    @staticmethod
    def reset() -> None:
        NattenContext.is_deterministic_mode_enabled = False
        NattenContext.is_kv_parallelism_enabled = True
        NattenContext.training_memory_preference = MemoryUsagePreference.Default
        NattenContext.flex_compile_allowed = False
        NattenContext.flex_compile_backprop_allowed = False


def set_memory_usage_preference(pref: str = "default") -> None:
    """Raises ValueError unless ``pref`` is "default", "strict" or "unrestricted"."""
    names = {preference.name.lower(): preference for preference in MemoryUsagePreference}
    if pref not in names:
        raise ValueError(f"memory usage preference {pref!r}; choices are {', '.join(names)}.")
    NattenContext.training_memory_preference = names[pref]


def get_memory_usage_preference() -> MemoryUsagePreference:
    return NattenContext.training_memory_preference


def is_memory_usage_default() -> bool:
    return get_memory_usage_preference() is MemoryUsagePreference.Default


def is_memory_usage_strict() -> bool:
    return get_memory_usage_preference() is MemoryUsagePreference.Strict


def is_memory_usage_unrestricted() -> bool:
    return get_memory_usage_preference() is MemoryUsagePreference.Unrestricted


def use_deterministic_algorithms(mode: bool = True) -> None:
    NattenContext.is_deterministic_mode_enabled = mode


def are_deterministic_algorithms_enabled() -> bool:
    return NattenContext.is_deterministic_mode_enabled


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    """Raises RuntimeError when turned on in deterministic mode; torch's own mode refuses with a line."""
    if mode and torch.are_deterministic_algorithms_enabled():
        logger.warning("KV parallelism stays off: torch.use_deterministic_algorithms is on.")
        return
    if mode and are_deterministic_algorithms_enabled():
        raise RuntimeError("KV parallelism is not deterministic, and deterministic algorithms are on: turn one off.")
    NattenContext.is_kv_parallelism_enabled = mode


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    return NattenContext.is_kv_parallelism_enabled


def is_flex_compile_allowed() -> bool:
    return NattenContext.flex_compile_allowed


def is_flex_compile_backprop_allowed() -> bool:
    return NattenContext.flex_compile_backprop_allowed


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> None:
    """Both flags as given; backprop only together with the forward. (NATTEN's own cannot turn them off.)"""
    NattenContext.flex_compile_allowed = mode
    NattenContext.flex_compile_backprop_allowed = mode and backprop


def allow_flex_compile_backprop(mode: bool = True) -> None:
    allow_flex_compile(is_flex_compile_allowed(), mode)


def disable_flex_compile() -> None:
    allow_flex_compile(False)


def disable_flex_compile_backprop() -> None:
    allow_flex_compile(is_flex_compile_allowed(), False)
