"""HAS_LIBNATTEN and the settings that NATTEN reads from the environment."""

from torch_nat.compat.natten.v0_21.utils.environment import (
    _IS_CUDA_AVAILABLE,
    _IS_TORCH_COMPILE_SUPPORTED,
    _TORCH_VERSION,
    parse_env_flag,
    parse_env_int,
)

#: NATTEN without its compiled library has no kernels of its own; torch_nat always has.
HAS_LIBNATTEN = True

_RUN_EXTENDED_TESTS = parse_env_flag("NATTEN_RUN_EXTENDED_TESTS", False)
_RUN_FLEX_TESTS = parse_env_flag("NATTEN_RUN_FLEX_TESTS", True)
_NUM_RAND_SWEEP_TESTS = parse_env_int("NATTEN_RAND_SWEEP_TESTS", 1000)
DISABLE_TQDM = parse_env_flag("NATTEN_DISABLE_TQDM", False)

__all__ = [
    "DISABLE_TQDM",
    "HAS_LIBNATTEN",
    "_IS_CUDA_AVAILABLE",
    "_IS_TORCH_COMPILE_SUPPORTED",
    "_NUM_RAND_SWEEP_TESTS",
    "_RUN_EXTENDED_TESTS",
    "_RUN_FLEX_TESTS",
    "_TORCH_VERSION",
]
