"""The process-wide switches of NATTEN 0.17: kept so that callers can set and read them. None changes a result.

torch_nat is always fused, deterministic, and plans by itself: there is nothing to tune automatically.
"""

from __future__ import annotations

from torch_nat.compat.natten.legacy.hardware import (
    disable_gemm_na,
    disable_tf32,
    disable_tiled_na,
    enable_gemm_na,
    enable_tf32,
    enable_tiled_na,
    get_device_cc,
    has_bfloat,
    has_cuda,
    has_fna,
    has_fp32_gemm,
    has_fp64_gemm,
    has_fused_na,
    has_gemm,
    has_half,
    has_tf32_gemm,
    is_gemm_na_enabled,
    is_tf32_in_gemm_na_enabled,
    is_tiled_na_enabled,
    use_gemm_na,
    use_tf32_in_gemm_na,
    use_tiled_na,
)
from torch_nat.compat.natten.v0_21 import context as _current
from torch_nat.compat.natten.v0_21.context import (
    MemoryUsagePreference,
    are_deterministic_algorithms_enabled,
    get_memory_usage_preference,
    is_memory_usage_default,
    is_memory_usage_strict,
    is_memory_usage_unrestricted,
    set_memory_usage_preference,
    use_deterministic_algorithms,
)
from torch_nat.compat.natten.v0_21.utils.log import get_logger

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
    "use_autotuner",
    "use_deterministic_algorithms",
    "use_fna",
    "use_fused_na",
    "use_gemm_na",
    "use_kv_parallelism_in_fused_na",
    "use_tf32_in_gemm_na",
    "use_tiled_na",
]

logger = get_logger(__name__)


class NattenContext(_current.NattenContext):
    """The state of the switches. Memory and determinism are those of `torch_nat.compat.natten.v0_21.context`."""

    is_fused_na_enabled: bool = False
    is_kv_parallelism_enabled: bool = False

    @staticmethod
    def reset() -> None:
        _current.NattenContext.reset()
        NattenContext.is_fused_na_enabled = False
        NattenContext.is_kv_parallelism_enabled = False


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    """Raises RuntimeError when turned on in deterministic mode."""
    if mode and are_deterministic_algorithms_enabled():
        raise RuntimeError("KV parallelism is not deterministic, and deterministic algorithms are on: turn one off.")
    NattenContext.is_kv_parallelism_enabled = mode


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    return NattenContext.is_kv_parallelism_enabled


def use_fused_na(mode: bool = True, kv_parallel: bool = True) -> None:
    """Fused attention is used either way."""
    use_kv_parallelism_in_fused_na(mode and kv_parallel)
    NattenContext.is_fused_na_enabled = mode


def is_fused_na_enabled() -> bool:
    return NattenContext.is_fused_na_enabled


use_fna, is_fna_enabled = use_fused_na, is_fused_na_enabled


class AutotunerContext:
    """What the auto-tuner was told. It has nothing to do."""

    enabled_for_forward: bool = False
    enabled_for_backward: bool = False
    thorough_mode_forward: bool = False
    thorough_mode_backward: bool = False
    warmup_steps_forward: int = 5
    warmup_steps_backward: int = 5
    steps_forward: int = 5
    steps_backward: int = 5

    @staticmethod
    def reset() -> None:
        disable_autotuner()
        for name in ("warmup_steps_forward", "warmup_steps_backward", "steps_forward", "steps_backward"):
            setattr(AutotunerContext, name, 5)


def use_autotuner(
    forward_pass: bool | None = None,
    backward_pass: bool | None = None,
    thorough_mode_forward: bool | None = None,
    thorough_mode_backward: bool | None = None,
    warmup_steps_forward: int | None = None,
    warmup_steps_backward: int | None = None,
    steps_forward: int | None = None,
    steps_backward: int | None = None,
) -> None:
    """Remembered, and without effect: kernels are planned, not tried. None leaves a setting as it is.

    Raises ValueError for a wrong type, RuntimeError when turned on in deterministic mode.
    """
    if (forward_pass or backward_pass) and are_deterministic_algorithms_enabled():
        raise RuntimeError("the auto-tuner is not deterministic, and deterministic algorithms are on: turn one off.")
    given = {
        "enabled_for_forward": (forward_pass, bool),
        "enabled_for_backward": (backward_pass, bool),
        "thorough_mode_forward": (thorough_mode_forward, bool),
        "thorough_mode_backward": (thorough_mode_backward, bool),
        "warmup_steps_forward": (warmup_steps_forward, int),
        "warmup_steps_backward": (warmup_steps_backward, int),
        "steps_forward": (steps_forward, int),
        "steps_backward": (steps_backward, int),
    }
    for name, (value, kind) in given.items():
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} is {value!r}, not {kind.__name__}.")
        if value is not None:
            setattr(AutotunerContext, name, value)
    if forward_pass or backward_pass:
        logger.info("use_autotuner has no effect: torch_nat plans its kernels and has nothing to tune.")


def disable_autotuner() -> None:
    for name in ("enabled_for_forward", "enabled_for_backward", "thorough_mode_forward", "thorough_mode_backward"):
        setattr(AutotunerContext, name, False)


def is_autotuner_enabled() -> bool:
    return AutotunerContext.enabled_for_forward or AutotunerContext.enabled_for_backward


def is_autotuner_enabled_for_forward() -> bool:
    return AutotunerContext.enabled_for_forward


def is_autotuner_enabled_for_backward() -> bool:
    return AutotunerContext.enabled_for_backward


def is_autotuner_thorough_for_forward() -> bool:
    return AutotunerContext.thorough_mode_forward


def is_autotuner_thorough_for_backward() -> bool:
    return AutotunerContext.thorough_mode_backward
