"""Environment variables and what the running torch supports."""

import os

import torch

from torch_nat.compat.natten.v0_21.utils.device import get_device_cc


def parse_env_flag(env_var: str, default: bool) -> bool:
    """True for "1", False for "0", else the default."""
    return {"0": False, "1": True}.get(os.environ.get(env_var, "").strip(), default)


def parse_env_int(env_var: str, default: int) -> int:
    try:
        return int(os.environ.get(env_var, "").strip())
    except ValueError:
        return default


def parse_env_str(env_var: str, default: str) -> str:
    return os.environ.get(env_var, str(default))


_IS_CUDA_AVAILABLE = torch.cuda.is_available()
_TORCH_VERSION = [int(part) for part in torch.__version__.split(".")[:2]]
_IS_TORCH_COMPILE_SUPPORTED = _TORCH_VERSION >= [2, 6] and get_device_cc() >= 70


def is_torch_compiling() -> bool:
    return torch.compiler.is_compiling()
