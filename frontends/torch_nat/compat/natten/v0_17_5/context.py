"""The switches of NATTEN 0.17.5: those of 0.17.4, and Flex Attention, which changes nothing here."""

from __future__ import annotations

from torch_nat.compat.natten.v0_17 import context as _before
from torch_nat.compat.natten.v0_17.context import (
    AutotunerContext,
    MemoryUsagePreference,
    are_deterministic_algorithms_enabled,
    disable_autotuner,
    disable_gemm_na,
    disable_tf32,
    disable_tiled_na,
    enable_gemm_na,
    enable_tf32,
    enable_tiled_na,
    get_device_cc,
    get_memory_usage_preference,
    has_bfloat,
    has_cuda,
    has_fna,
    has_fp32_gemm,
    has_fp64_gemm,
    has_fused_na,
    has_gemm,
    has_half,
    has_tf32_gemm,
    is_autotuner_enabled,
    is_autotuner_enabled_for_backward,
    is_autotuner_enabled_for_forward,
    is_autotuner_thorough_for_backward,
    is_autotuner_thorough_for_forward,
    is_fna_enabled,
    is_fused_na_enabled,
    is_gemm_na_enabled,
    is_kv_parallelism_in_fused_na_enabled,
    is_memory_usage_default,
    is_memory_usage_strict,
    is_memory_usage_unrestricted,
    is_tf32_in_gemm_na_enabled,
    is_tiled_na_enabled,
    set_memory_usage_preference,
    use_autotuner,
    use_deterministic_algorithms,
    use_gemm_na,
    use_kv_parallelism_in_fused_na,
    use_tf32_in_gemm_na,
    use_tiled_na,
)

__all__ = [
    "AutotunerContext",
    "MemoryUsagePreference",
    "NattenContext",
    "are_deterministic_algorithms_enabled",
    "disable_autotuner",
    "disable_gemm_na",
    "disable_tf32",
    "disable_tiled_na",
    "enable_gemm_na",
    "enable_tf32",
    "enable_tiled_na",
    "force_flex_attention",
    "get_device_cc",
    "get_memory_usage_preference",
    "has_bfloat",
    "has_cuda",
    "has_fna",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_fused_na",
    "has_gemm",
    "has_half",
    "has_tf32_gemm",
    "is_autotuner_enabled",
    "is_autotuner_enabled_for_backward",
    "is_autotuner_enabled_for_forward",
    "is_autotuner_thorough_for_backward",
    "is_autotuner_thorough_for_forward",
    "is_fna_enabled",
    "is_fused_na_enabled",
    "is_gemm_na_enabled",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "is_tf32_in_gemm_na_enabled",
    "is_tiled_na_enabled",
    "set_memory_usage_preference",
    "should_force_flex_attention",
    "should_use_flex_attention",
    "use_autotuner",
    "use_deterministic_algorithms",
    "use_flex_attention",
    "use_fna",
    "use_fused_na",
    "use_gemm_na",
    "use_kv_parallelism_in_fused_na",
    "use_tf32_in_gemm_na",
    "use_tiled_na",
]


class NattenContext(_before.NattenContext):
    """The state of the switches. All but Flex are those of 0.17.4."""

    use_flex_attention: bool = False
    force_flex_attention: bool = False

    @staticmethod
    def reset() -> None:
        _before.NattenContext.reset()
        NattenContext.use_flex_attention = NattenContext.force_flex_attention = False


def use_fused_na(
    mode: bool = True,
    kv_parallel: bool = True,
    use_flex_attention: bool = False,
    force_flex_attention: bool = False,
) -> None:
    """Fused attention is used either way, and it is torch_nat's."""
    _before.use_fused_na(mode, kv_parallel)
    NattenContext.use_flex_attention = mode and use_flex_attention
    NattenContext.force_flex_attention = mode and force_flex_attention


use_fna = use_fused_na


def use_flex_attention() -> None:
    use_fused_na(use_flex_attention=True)


def force_flex_attention() -> None:
    use_fused_na(use_flex_attention=True, force_flex_attention=True)


def should_use_flex_attention() -> bool:
    return NattenContext.use_flex_attention


def should_force_flex_attention() -> bool:
    return NattenContext.force_flex_attention
